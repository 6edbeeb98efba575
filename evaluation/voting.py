"""`python -m evaluation.voting --left DIR --right DIR`: a local page where people vote between two models' images.

Each page shows one prompt and two images without names, in an order that is drawn for every battle anew but stays when
the page is loaded again. Votes are appended to a JSON Lines file that `evaluation.battles.read_battles` reads; a battle
that was voted on is not shown again, so voting can be interrupted.

The pages know neither names nor paths nor prompt ids: battles have keyed names that the server alone can resolve.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from typing_extensions import override

from evaluation.battles import Battle
from evaluation.voting_page import VOTES, done_page, voting_page

_MAX_BODY = 1000
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'"
    ),
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
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
        """The PNG on a side of a battle's page (`left`, `right`, `source`); KeyError for an unknown battle or side."""
        key = self._keys[token]
        if side == "source":
            return self._sources[key[0]].read_bytes()
        model = self._sides(key)[{"left": 0, "right": 1}[side]]
        return (self._directories[model] / self._rows[model][key]["file"]).read_bytes()

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
    path = directory / "index.jsonl"
    if not path.is_file():
        raise ValueError(f"No '{path}': give a directory that callbacks.ImageWriter wrote, such as .../images.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["id"], row["member"]): row for row in rows}


def _read_voted(path: Path, names: tuple[str, str]) -> set[Key]:
    """The battles of these two models that the file has."""
    if not path.is_file():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {(row["prompt"], row["member"]) for row in rows if {row["first"], row["second"]} == set(names)}


class VotingHandler(BaseHTTPRequestHandler):
    """Serves the ballot of its server."""

    server: VotingServer

    @override
    def do_GET(self) -> None:
        ballot = self.server.ballot
        parts = self.path.split("/")[1:]
        if parts == [""]:
            battles = ballot.open()
            page = done_page(ballot.voted) if not battles else _battle_page(ballot, battles)
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page.encode())
        elif len(parts) == 3 and parts[0] == "image":
            try:
                self._answer(HTTPStatus.OK, "image/png", ballot.image(parts[1], parts[2]))
            except KeyError:
                self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    @override
    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        # A form on any other site could post here from the voter's browser: its origin gives it away.
        origin = self.headers.get("Origin")
        foreign = origin is not None and origin.partition("://")[2] != self.headers.get("Host")
        if self.path != "/vote" or foreign or not 0 < length <= _MAX_BODY:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        form = parse_qs(self.rfile.read(length).decode("utf-8", "replace"))
        try:
            self.server.ballot.vote(form["battle"][0], form["vote"][0])
        except KeyError:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        self.send_response(HTTPStatus.SEE_OTHER)  # so that loading the page again does not vote again
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: HTTPStatus) -> None:
        self._answer(status, "text/plain; charset=utf-8", status.phrase.encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (_HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the votes are in the file."""


class VotingServer(ThreadingHTTPServer):
    """The page's server.

    Args:
        ballot: what to vote on.
        port: 0 takes a free one; `server_port` says which.
        host: who may reach it; the default is this machine alone.
    """

    def __init__(self, ballot: Ballot, port: int, host: str = "127.0.0.1") -> None:
        self.ballot = ballot
        super().__init__((host, port), VotingHandler)


def _battle_page(ballot: Ballot, battles: list[str]) -> str:
    token = battles[0]
    return voting_page(token=token, prompt=ballot.prompt(token), left=len(battles), source=ballot.has_source(token))


def read_sources(path: Path) -> dict[int, Path]:
    """Source images by id, of an edit file `{"id", "instruction", "source", ...}`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: path.parent / row["source"] for row in rows}


def _named(text: str) -> tuple[str, Path]:
    name, equals, directory = text.partition("=")
    return (name, Path(directory)) if equals else (Path(text).name, Path(text))


def main(args: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A local page on which people vote between two models' images.")
    parser.add_argument("--left", type=_named, required=True, metavar="[NAME=]DIR", help="images of one model")
    parser.add_argument("--right", type=_named, required=True, metavar="[NAME=]DIR", help="images of the other")
    parser.add_argument("--votes", type=Path, default=Path("runs/votes.jsonl"), help="file that votes are appended to")
    parser.add_argument("--edits", type=Path, help="edit file, to show each edit's source image")
    parser.add_argument("--port", type=int, default=8765)
    given = parser.parse_args(args)
    try:
        sources = read_sources(given.edits) if given.edits else None
        ballot = Ballot(given.left, given.right, given.votes, sources=sources)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with VotingServer(ballot, given.port) as server:
        print(f"Vote at http://127.0.0.1:{server.server_port} ({len(ballot.open())} battles); Ctrl-C ends.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"\n{ballot.voted} votes in {given.votes}. Ratings: python -m evaluation.rate_battles {given.votes}")


if __name__ == "__main__":
    main()
