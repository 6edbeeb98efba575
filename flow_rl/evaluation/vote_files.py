"""What voting reads from disk: images with their index, edits with their sources, and votes.

Every complaint names the file and the line.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flow_rl import strict_json
from flow_rl.strict_json import NoNumberError, RepeatedKeyError
from flow_rl.suggestions import nearest_path

#: prompt id and member of an image
Key = tuple[int, int]
#: longest file that is sent to a voter
MAX_PICTURE_BYTES = 64 * 2**20
#: what browsers show, by how it begins
MEDIA_TYPES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "image/gif": re.compile(rb"GIF8[79]a"),
}


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One vote on two images of a prompt.

    Attributes:
        where: file and line, for messages.
        key: prompt id and member of both images.
        first: name of one model.
        second: name of the other.
        credit: of the first, in [0, 1]: above 0.5 the voter prefers it, 0.5 is a tie.
        text: the prompt, as the voter read it.
    """

    where: str
    key: Key
    first: str
    second: str
    credit: float
    text: str


def read_rows(path: Path, fields: Mapping[str, type]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with its file and line; blank lines are skipped.

    Args:
        path: the file.
        fields: keys that every object must have, and their types; float takes integers as well.

    Raises:
        ValueError: a file that is missing or cannot be read, or a line that is not such an object.
    """
    if not path.is_file():
        raise ValueError(f"No file '{path}'.{nearest_path(path)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from None
    lines = enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1)
    return [_parsed(line, fields, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parsed(line: bytes, fields: Mapping[str, type], where: str) -> tuple[str, dict[str, Any]]:
    row = _json(line, where)
    missing = [name for name in fields if not isinstance(row, dict) or name not in row]
    if missing:
        raise ValueError(f"{where}: expected an object with {', '.join(fields)}; {', '.join(missing)} is missing.")
    for name, kind in fields.items():
        accepted = (int, float) if kind is float else kind
        if not isinstance(row[name], accepted) or isinstance(row[name], bool):
            raise ValueError(f"{where}: '{name}' must be {kind.__name__}, received {row[name]!r:.80}.")
        if kind is str and not _can_be_shown(row[name]):
            raise ValueError(f"{where}: '{name}' has half a character (a lone surrogate), which no page can show.")
    return where, row


def _json(line: bytes, where: str) -> Any:
    try:
        return strict_json.parse(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}). Remove the line if it is torn.") from None
    except RepeatedKeyError as error:
        raise ValueError(f"{where}: '{error.key:.80}' is there twice: remove one.") from None
    except NoNumberError as error:
        raise ValueError(f"{where}: {error.word} is no number of JSON.") from None
    except RecursionError:
        raise ValueError(f"{where}: brackets in brackets, deeper than any such file has.") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _can_be_shown(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_index(directory: Path) -> dict[Key, dict[str, Any]]:
    """Rows of an image folder's index by prompt id and member, each with a key `where`: its file and line.

    Raises:
        ValueError: no index, a line that is not a row of one, or two rows of one id and member.
    """
    index = directory / "index.jsonl"
    if not index.is_file():
        raise ValueError(f"No '{index}': give a directory that callbacks.ImageWriter wrote, such as .../images.")
    rows: dict[Key, dict[str, Any]] = {}
    for where, row in read_rows(index, {"id": int, "member": int, "file": str, "prompt": str, "category": str}):
        key = (row["id"], row["member"])
        if key in rows:
            raise ValueError(
                f"{where}: id {key[0]}, member {key[1]} is that of {rows[key]['where']} already. Two tasks may use the "
                "same ids: draw each into a folder of its own."
            )
        rows[key] = row | {"where": where}
    return rows


def image_path(directory: Path, row: Mapping[str, Any]) -> Path:
    """Where the image of an index's row lies; it need not exist.

    Raises:
        ValueError: outside of the directory. An index may come from a stranger, and must not point at other files of
            this machine.
    """
    try:
        path = (directory / row["file"]).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a circle, a zero byte
        raise ValueError(
            f"{row['where']}: Prompt {row['id']}: the image {row['file']!r:.200} is no path: {error}."
        ) from None
    if not path.is_relative_to(directory.resolve()):
        raise ValueError(
            f"{row['where']}: Prompt {row['id']}: the image '{row['file']:.200}' lies outside of '{directory}'."
        )
    return path


def read_picture(path: Path) -> tuple[bytes, str]:
    """A picture's content and media type.

    Raises:
        ValueError: naming a file that is missing, is no picture that browsers show, or is too large for one. What a
            stranger's index names may be anything.
    """
    try:
        if not path.is_file():
            raise ValueError(f"no image '{path}'.")
        size = path.stat().st_size
        if size > MAX_PICTURE_BYTES:
            raise ValueError(f"the image '{path}' has {size} bytes, more than {MAX_PICTURE_BYTES}.")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the image '{path!s:.200}' cannot be read: {error.strerror}.") from None
    kind = next((kind for kind, found in MEDIA_TYPES.items() if found.match(content)), None)
    if kind is None:
        raise ValueError(f"'{path}' is no PNG, JPEG, WebP or GIF: it begins with {content[:8].hex(' ') or 'nothing'}.")
    return content, kind


def check_picture(path: Path) -> None:
    """Refuse what `read_picture` does, and a picture that is damaged.

    Raises:
        ValueError: naming the file.
    """
    content, _ = read_picture(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except Exception as error:  # Pillow raises what its decoders do
        raise ValueError(f"the image '{path}' is damaged: {error}.") from None


def read_sources(path: Path) -> dict[int, Path]:
    """Source images by id, of an edit file `{"id", "instruction", "source", ...}`.

    Raises:
        ValueError: naming a line that is not a row of an edit file.
    """
    return {row["id"]: path.parent / row["source"] for _, row in read_rows(path, {"id": int, "source": str})}


def read_votes(paths: Sequence[Path]) -> list[Vote]:
    """All votes of files that the voting page wrote.

    Raises:
        ValueError: a missing file, a file without votes, a line that is not a vote, or one that occurs twice.
    """
    fields = {"prompt": int, "member": int, "first": str, "second": str, "credit": float, "text": str}
    votes: list[Vote] = []
    seen: dict[str, str] = {}
    rows = {path: read_rows(path, fields) for path in paths}
    for path, found in rows.items():
        if not found:
            raise ValueError(f"'{path}' has no votes.")
    for where, row in (pair for found in rows.values() for pair in found):
        if row["first"] == row["second"]:
            raise ValueError(f"{where}: '{row['first']}' cannot battle itself.")
        if not 0 <= row["credit"] <= 1:
            raise ValueError(f"{where}: 'credit' is {row['credit']}; it lies between 0 (lost) and 1 (won).")
        # Two voters may agree, but not in the same millisecond.
        if "time" in row and (before := seen.setdefault(json.dumps(row, sort_keys=True), where)) != where:
            raise ValueError(f"{where}: a copy of {before}. One vote would count twice: remove it.")
        key = (row["prompt"], row["member"])
        first, second, credit = row["first"], row["second"], float(row["credit"])
        votes.append(Vote(where=where, key=key, first=first, second=second, credit=credit, text=row["text"]))
    return votes


def named_directory(text: str) -> tuple[str, Path]:
    """`NAME=DIR` as name and directory; without a name it is the directory's."""
    name, equals, directory = text.partition("=")
    return (name, Path(directory)) if equals else (Path(text).name, Path(text))
