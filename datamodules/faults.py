"""What is wrong with data files: all of it in one message, a line a row, up to a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flow_rl.errors import SettingError

#: faults that a message lists; the rest is counted
SHOWN = 20
#: characters of one fault
LONGEST = 600


class DataError(SettingError):
    """Rows of data files that cannot be used.

    Args:
        faults: a sentence each, with file and line.

    Attributes:
        faults: all of them, whatever the message lists.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(listed(self.faults, SHOWN))


def listed(faults: Sequence[str], most: int) -> str:
    """One message of several faults, numbered, the rest counted behind `most` of them."""
    shown = [fault if len(fault) <= LONGEST else f"{fault[:LONGEST]} ..." for fault in faults[:most]]
    if len(faults) == 1:
        return shown[0]
    lines = [f"{len(faults)} faults in the data:", *(f"  {number}. {fault}" for number, fault in enumerate(shown, 1))]
    if len(faults) > most:
        lines.append(f"  ... and {len(faults) - most} more.")
    return "\n".join(lines)


class Faults:
    """Collects faults, to raise all of them at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, path: str | Path, line: int | None, text: str) -> None:
        """Note a fault.

        Args:
            path: of the file.
            line: counted from 1; None for the file as a whole.
            text: what is wrong and what to do.
        """
        self.found.append(f"{path}, line {line}: {text}" if line else f"{path}: {text}")

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Go on behind the block, keeping what a `DataError` inside of it says."""
        try:
            yield
        except DataError as error:
            self.found.extend(error.faults)

    def check(self) -> None:
        """Stop if anything was found.

        Raises:
            DataError: with all of it.
        """
        if self.found:
            raise DataError(self.found)
