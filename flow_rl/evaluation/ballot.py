"""Which image of two is better: the battles that people vote on, and their votes on disk."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flow_rl.evaluation.battles import Battle

#: what a voter can say, by the value of its button
VOTES = {"left": "Left is better", "tie": "As good", "right": "Right is better"}
#: prompt id and member of an image
Key = tuple[int, int]


class Ballot:
    """The battles of two models, in a random order, and the votes on them.

    Args:
        left: model name and the directory of its images, as `callbacks.ImageWriter` leaves it. Which side of the page
            its images come on is drawn for each battle.
        right: the other model's.
        votes: file that votes are appended to; what it holds already counts as voted.
        sources: prompt id to source image, for edits.
        secret: keys the order, the sides and the battles' names; drawn anew if omitted.

    Raises:
        ValueError: a directory without an index, one name for both, or no prompt that both models answered.
    """

    def __init__(
        self,
        left: tuple[str, Path],
        right: tuple[str, Path],
        votes: Path,
        *,
        sources: Mapping[int, Path] | None = None,
        secret: bytes | None = None,
    ) -> None:
        if left[0] == right[0]:
            raise ValueError(f"Both models are called '{left[0]}': give names, such as --left base=DIR.")
        self.names = (left[0], right[0])
        self._secret = secret or secrets.token_bytes(16)
        self._sources = sources or {}
        self._directories = (left[1], right[1])
        self._rows = tuple(_read_index(directory) for directory in self._directories)
        shared = self._rows[0].keys() & self._rows[1].keys()
        if not shared:
            raise ValueError(f"'{left[1]}' and '{right[1]}' have no prompt id in common: there is nothing to compare.")
        self._keys = {self._keyed("name", key): key for key in sorted(shared)}
        self._order = sorted(self._keys)
        self._file, self._lock = votes, threading.Lock()
        self._voted = _read_voted(votes, self.names)

    def _keyed(self, purpose: str, key: Key) -> str:
        message = f"{purpose}:{key[0]}:{key[1]}".encode()
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()[:24]

    @property
    def voted(self) -> int:
        """Battles of these two models that have a vote."""
        return len(self._voted)

    def open(self) -> list[str]:
        """Names of the battles without a vote, in the order of the pages."""
        return [token for token in self._order if self._keys[token] not in self._voted]

    def prompt(self, token: str) -> str:
        """What both images of a battle were asked for; KeyError for an unknown one."""
        return self._rows[0][self._keys[token]]["prompt"]

    def has_source(self, token: str) -> bool:
        """Whether there is a source image to show beside a battle."""
        return self._keys[token][0] in self._sources

    def image(self, token: str, side: str) -> bytes:
        """The PNG on a side of a battle's page.

        Args:
            token: name of the battle.
            side: `left`, `right` or `source`.

        Raises:
            KeyError: an unknown battle or side.
            ValueError: see `check_images`.
        """
        key = self._keys[token]
        if side == "source":
            return self._sources[key[0]].read_bytes()
        model = self._sides(key)[{"left": 0, "right": 1}[side]]
        return self._path(model, key).read_bytes()

    def check_images(self) -> None:
        """Refuse what `image` could not show later.

        Raises:
            ValueError: naming an image that is missing, or lies outside of its model's directory.
        """
        for key in self._keys.values():
            shown = [self._path(model, key) for model in (0, 1)]
            for path in (*shown, *filter(None, [self._sources.get(key[0])])):
                if not path.is_file():
                    raise ValueError(f"Prompt {key[0]}: no image '{path}'.")

    def _path(self, model: int, key: Key) -> Path:
        directory, file = self._directories[model], self._rows[model][key]["file"]
        path = (directory / file).resolve()
        # An index may come from a stranger: it must not show the voter other files of this machine.
        if not path.is_relative_to(directory.resolve()):
            raise ValueError(f"Prompt {key[0]}: the image '{file}' lies outside of '{directory}'.")
        return path

    def vote(self, token: str, choice: str) -> None:
        """Append a vote, complete on disk before it counts; a second vote on a battle is ignored.

        Raises:
            KeyError: an unknown battle or choice.
        """
        key, choice = self._keys[token], {value: value for value in VOTES}[choice]
        sides = self._sides(key)
        row = self._rows[0][key]
        first, second = (self.names[model] for model in sides)
        credit = {"left": 1.0, "tie": 0.5, "right": 0.0}[choice]
        record = {"prompt": key[0], "category": row["category"], "first": first, "second": second, "credit": credit}
        Battle(**record)  # what is written can be read
        line = json.dumps(record | {"member": key[1], "text": row["prompt"], "time": round(time.time(), 3)}) + "\n"
        with self._lock:
            if key in self._voted:
                return
            _append(self._file, line)
            self._voted.add(key)

    def _sides(self, key: Key) -> tuple[int, int]:
        """Which model stands left and which right."""
        return (0, 1) if int(self._keyed("side", key), 16) % 2 else (1, 0)


def _append(path: Path, line: str) -> None:
    """One write of a whole line at the end of the file: two servers on one file do not mix their lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_index(directory: Path) -> dict[Key, dict[str, Any]]:
    """Rows of a folder's index by battle.

    Raises:
        ValueError: no index, or a line that is not a row of one.
    """
    index = directory / "index.jsonl"
    if not index.is_file():
        raise ValueError(f"No '{index}': give a directory that callbacks.ImageWriter wrote, such as .../images.")
    fields = ("id", "member", "file", "prompt", "category")
    lines = enumerate(index.read_text(encoding="utf-8").splitlines(), start=1)
    rows = [_parsed(line, fields, f"{index}, line {number}") for number, line in lines]
    return {(row["id"], row["member"]): row for row in rows}


def _read_voted(path: Path, names: tuple[str, str]) -> set[Key]:
    """The battles of these two models that the file has.

    Raises:
        ValueError: naming a line that is not a vote.
    """
    if not path.is_file():
        return set()
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    fields = ("prompt", "member", "first", "second")
    rows = [_parsed(line, fields, f"{path}, line {number}") for number, line in lines if line.strip()]
    return {(row["prompt"], row["member"]) for row in rows if {row["first"], row["second"]} == set(names)}


def read_sources(path: Path) -> dict[int, Path]:
    """Source images by id, of an edit file `{"id", "instruction", "source", ...}`.

    Raises:
        ValueError: naming a line that is not a row of an edit file.
    """
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    rows = [_parsed(line, ("id", "source"), f"{path}, line {number}") for number, line in lines if line.strip()]
    return {row["id"]: path.parent / row["source"] for row in rows}


def _parsed(line: str, fields: tuple[str, ...], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}). Remove the line if it is torn.") from None
    missing = [name for name in fields if not isinstance(row, dict) or name not in row]
    if missing:
        raise ValueError(f"{where}: expected an object with {', '.join(fields)}; {', '.join(missing)} is missing.")
    return row
