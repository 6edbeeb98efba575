"""What a user sees while stages run side by side: the last line of each, and the end of the one that failed."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_TAIL_BYTES = 8192
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
#: seconds between two lines of a stage where nothing can be drawn over, such as in a log file
_QUIET = 30.0


def last_line(log: Path) -> str:
    """What a stage has written last: a progress bar draws over itself, so carriage returns end lines as well."""
    lines = [_CONTROL.sub("", part).strip() for part in re.split(r"[\r\n]", _tail(log))]
    return next((line for line in reversed(lines) if line), "starts")


def ending(log: Path, count: int = 30) -> str:
    """The last lines of a stage's output, each as it stood in the end."""
    lines = [_CONTROL.sub("", line).rstrip().rsplit("\r", 1)[-1] for line in _tail(log).split("\n")]
    return "\n".join([line for line in lines if line][-count:])


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


class StageDisplay:
    """Headings that stay, and below them one line for each stage at work, drawn over as it changes."""

    def __init__(self) -> None:
        self._drawn = 0
        self._spoke = time.monotonic()

    def say(self, text: str) -> None:
        """Print something that stays."""
        self._clear()
        print(text, flush=True)

    def update(self, logs: Mapping[str, Path]) -> None:
        """Show where the stages at work are.

        Args:
            logs: file that each stage writes to, by name.
        """
        drawing = sys.stdout.isatty()
        if not drawing and time.monotonic() - self._spoke <= _QUIET:
            return
        self._clear()
        self._spoke = time.monotonic()
        lines = [f"  {name}: {last_line(log)}" for name, log in logs.items()]
        width = shutil.get_terminal_size().columns - 1 if drawing else None
        print("".join(f"{line[:width]}\n" for line in lines), end="", flush=True)
        self._drawn = len(lines) if drawing else 0

    def _clear(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}F\x1b[J", end="")
        self._drawn = 0
