"""Which image of two is better: the battles that people vote on, and their votes on disk."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from flow_rl.evaluation.battles import Battle
from flow_rl.evaluation.vote_files import Key, check_picture, image_path, read_index, read_picture, read_rows

#: what a voter can say, by the value of its button
VOTES = {"left": "Left is better", "tie": "As good", "right": "Right is better"}


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
        self._rows = tuple(read_index(directory) for directory in self._directories)
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

    def image(self, token: str, side: str) -> tuple[bytes, str]:
        """The picture on a side of a battle's page, and its media type.

        Args:
            token: name of the battle.
            side: `left`, `right` or `source`.

        Raises:
            KeyError: an unknown battle or side.
            ValueError: see `check_images`.
        """
        key = self._keys[token]
        if side == "source":
            return read_picture(self._sources[key[0]])
        model = self._sides(key)[{"left": 0, "right": 1}[side]]
        return read_picture(self._path(model, key))

    def check_images(self) -> None:
        """Refuse what `image` could not show later.

        Raises:
            ValueError: naming an image that is missing, damaged or none, or lies outside of its model's directory.
        """
        for key in self._keys.values():
            shown = [self._path(model, key) for model in (0, 1)]
            for path in (*shown, *filter(None, [self._sources.get(key[0])])):
                try:
                    check_picture(path)
                except ValueError as error:
                    raise ValueError(f"Prompt {key[0]}: {error}") from None

    def _path(self, model: int, key: Key) -> Path:
        return image_path(self._directories[model], self._rows[model][key])

    def vote(self, token: str, choice: str) -> None:
        """Append a vote, complete on disk before it counts; a second vote on a battle is ignored.

        Raises:
            KeyError: an unknown battle or choice.
            OSError: the vote could not be written; it does not count, and the file is as before.
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
    """One write of a whole line at the end of the file: two servers on one file do not mix their lines.

    A line that was torn before stays apart from this one. Where the disk is full, nothing of this one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.fstat(descriptor).st_size
        torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
        content = ("\n" if torn else "").encode() + line.encode()
        if (written := os.write(descriptor, content)) != len(content):
            os.truncate(descriptor, end)
            raise OSError(errno.ENOSPC, f"{written} of {len(content)} bytes of a vote could be written", str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_votes_file(path: Path) -> None:
    """Refuse a file that no vote could be written to, before anybody has voted.

    Raises:
        ValueError: naming it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        usable = path.is_file() and os.access(path, os.R_OK | os.W_OK)
        usable |= not path.exists() and os.access(path.parent, os.W_OK | os.X_OK)
    except OSError as error:
        raise ValueError(f"Votes cannot be written to '{path}': {error.strerror}.") from None
    if not usable:
        raise ValueError(f"Votes cannot be written to '{path}': expected a file that this user may write.")


def _read_voted(path: Path, names: tuple[str, str]) -> set[Key]:
    """The battles of these two models that the file has.

    Raises:
        ValueError: naming a line that is not a vote.
    """
    if not path.is_file():
        return set()
    rows = [row for _, row in read_rows(path, {"prompt": int, "member": int, "first": str, "second": str})]
    return {(row["prompt"], row["member"]) for row in rows if {row["first"], row["second"]} == set(names)}
