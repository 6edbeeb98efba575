"""Lines of text files, or what is wrong with the file: no file, no text, or another encoding than UTF-8."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from datamodules.faults import DataError, Faults
from flow_rl.file_kinds import kind_of
from flow_rl.names import bad_character
from flow_rl.suggestions import nearest_path

#: what ends a line. JSON allows no bare carriage return in a string, so that an old Mac's line ends are safe, too.
_LINE_END = re.compile(rb"\r\n|\n|\r")
_OTHER_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
                (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))  # fmt: skip
_CONVERT = "Save it as UTF-8 (`iconv -f {name} -t UTF-8 OLD > NEW`)."


def read_lines(path: str | Path, faults: Faults) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1; a mark at its start is left out.

    Args:
        path: the file.
        faults: where lines go that are no UTF-8.

    Raises:
        DataError: no such file, a directory, one that may not be read, or one that holds no UTF-8 text at all.
    """
    data = _read(path)
    if fault := _no_text(data):
        raise DataError([f"{path}: {fault}"])
    found = []
    for number, line in enumerate(_LINE_END.split(data.removeprefix(codecs.BOM_UTF8)), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            guess = line.decode("cp1252", errors="replace").strip()
            faults.add(
                path,
                number,
                f"not UTF-8 (byte 0x{line[error.start]:02X} at position {error.start + 1}). In Windows-1252 (Latin-1) "
                f"it reads {guess!r:.80}. {_CONVERT.format(name='WINDOWS-1252')}",
            )
            continue
        if text.strip():
            found.append((number, text))
    return found


def _read(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises:
        DataError: there is none that can be read.
    """
    shown = str(path)
    if not shown.strip():
        raise DataError([f"'{shown}' is no path: name a file."])
    if found := bad_character(shown):
        raise DataError([f"Cannot read the file {shown!a:.200}: its path holds {found}."])
    try:
        file = Path(path)
        if file.is_dir():
            files = sorted(p.name for p in file.glob("*.json*"))
            hint = f" It holds {', '.join(files[:5])}." if files else ""
            raise DataError([f"'{path}' is a directory: name a file in it.{hint}"])
        if not file.exists():
            raise DataError([f"No file '{path}'.{_why_missing(shown) or nearest_path(file)}"])
        if not file.is_file():
            raise DataError([f"'{path}' is no regular file, and is read several times: write its content to one."])
        return file.read_bytes()
    except DataError:
        raise
    except OSError as error:
        raise DataError([f"Cannot read the file '{shown!a:.200}': {error.strerror or error}."]) from None


def _why_missing(path: str) -> str:
    if re.match(r"[a-z0-9]+:/", path):
        return " Data are read from local files alone: download it first."
    if path.startswith("~"):
        return " '~' is not replaced here: write the whole path."
    if path != path.strip():
        return " The path begins or ends with a blank."
    return ""


def _no_text(data: bytes) -> str | None:
    """Why a file as a whole is no UTF-8 text; None where it seems to be."""
    for mark, name in _OTHER_MARKS:
        if data.startswith(mark):
            return f"it is {name} text, as some Windows tools write; expected UTF-8. {_CONVERT.format(name=name)}"
    if kind := kind_of(data):
        return f"expected UTF-8 text, and it is {kind}."
    head = data[:4096]
    if len(head) >= 4 and head.count(0) >= len(head) // 3:
        if not any(head):
            return "it holds zeros alone, as an interrupted copy leaves: copy it again."
        name = "UTF-16LE" if head[1::2].count(0) > head[::2].count(0) else "UTF-16BE"
        return f"it is {name} text or binary data; expected UTF-8. {_CONVERT.format(name=name)}"
    return None
