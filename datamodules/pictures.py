"""Pictures that rows of data files name: all of them are decoded as the file is read, and again when they are due.

Decoding is shared by threads and remembered by content, so that a second start only reads the files. The memory is a
text file in the user's cache directory (`$XDG_CACHE_HOME/flow_rl`, by default under `~/.cache`): it may be deleted
at any time, and where it can't be written pictures are decoded at every start.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL
from PIL import Image
from tqdm import tqdm

from datamodules.faults import Faults
from flow_rl.errors import RunStopped
from flow_rl.messages import rank_and_size
from flow_rl.pictures import READER_VERSION, PictureError, decode_picture, read_bytes, read_picture
from flow_rl.suggestions import nearest_path

#: seconds of checking before a progress bar shows
_PATIENCE = 2.0
#: threads: decoding holds whole pictures in memory, a few hundred megabytes each at worst
_MOST_THREADS = 16

open_picture = read_picture


class PictureChanged(RunStopped, PictureError):
    """A picture was right when the run started and is not any more; the message names row and file."""


@dataclass(frozen=True, kw_only=True)
class PictureUse:
    """A picture that a row names.

    Attributes:
        file: the data file.
        line: of the row, from 1.
        key: of the field.
        value: what the row says.
        path: of the picture.
    """

    file: str
    line: int
    key: str
    value: str
    path: Path

    @property
    def where(self) -> str:
        """The row, for messages."""
        return f"{self.file}, line {self.line}"

    def missing(self) -> str | None:
        """The complaint about a file that is not there or is no file."""
        try:
            if self.path.is_file():
                return None
            if self.path.is_dir():
                return f"{self.key} '{self.value}' is a directory: name a picture in it."
            hint = nearest_path(self.path)
        except (OSError, ValueError):  # longer than a path may be
            hint = ""
        return f"{self.key} {self.value!r:.200} is not there (paths are relative to '{Path(self.file).parent}').{hint}"

    def read(self) -> Image.Image:
        """The picture, now that it is due.

        Raises:
            PictureChanged: it can't be read any more.
        """
        try:
            return read_picture(self.path)
        except PictureError as error:
            raise PictureChanged(
                f"{self.where}: {self.key}: {error} It could be read when the run started: put it back and resume."
            ) from None


def check_pictures(
    uses: Sequence[PictureUse],
    faults: Faults,
    *,
    fits: Callable[[PictureUse, tuple[int, int]], str | None] = lambda use, size: None,
) -> None:
    """Decode every picture that rows name, each once, and note those that can't be read.

    Under a launcher that starts all ranks, each checks its share: training begins when all have.

    Args:
        uses: by row.
        faults: takes what is wrong.
        fits: called with a use and the picture's width and height; what it returns is wrong with them.
    """
    present = []
    for use in uses:
        if complaint := use.missing():
            faults.add(use.file, use.line, complaint)
        else:
            present.append(use)
    rank, size = rank_and_size()
    mine = list(dict.fromkeys(use.path for use in present))[rank::size]
    found = dict(zip(mine, _examined(mine, quiet=rank > 0), strict=True))
    for use in present:
        result = found.get(use.path, (0, 0))
        if isinstance(result, str):
            faults.add(use.file, use.line, f"{use.key}: {result}")
        elif use.path in found and (complaint := fits(use, result)):
            faults.add(use.file, use.line, f"{use.key}: {complaint}")


def _examined(paths: Sequence[Path], *, quiet: bool) -> Iterator[str | tuple[int, int]]:
    """Width and height of each picture as a viewer shows it, or what is wrong with it; in the order of the uses."""
    memory = Memory()
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4))
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(partial(_examine, memory), paths)
        yield from tqdm(
            results,
            total=len(paths),
            desc="Checking pictures",
            unit="picture",
            delay=_PATIENCE,
            leave=False,
            disable=quiet,
        )
    memory.save()


def _examine(memory: Memory, path: Path) -> str | tuple[int, int]:
    try:
        data = read_bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        size = memory.sizes.get(digest)
        if size is None:
            size = memory.new[digest] = decode_picture(data, f"the image '{path}'").size
        return size
    except PictureError as error:
        return str(error)


class Memory:
    """Sizes of pictures that were decoded before, by the hash of their files; broken ones are not remembered.

    Attributes:
        sizes: width and height by digest, from earlier runs.
        new: the same, found in this one.
    """

    def __init__(self) -> None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        # Whatever may decode otherwise has a file of its own.
        self.path = Path(root) / "flow_rl" / f"pictures-{READER_VERSION}-pillow-{PIL.__version__}.txt"
        self.sizes: dict[str, tuple[int, int]] = {}
        self.new: dict[str, tuple[int, int]] = {}
        try:
            lines = self.path.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            return
        for line in lines:
            digest, *numbers = line.split()[:3] or [""]
            # A line that was cut off is as good as none.
            if len(digest) == 64 and len(numbers) == 2 and all(number.isdecimal() for number in numbers):
                self.sizes[digest] = (int(numbers[0]), int(numbers[1]))

    def save(self) -> None:
        """Append what is new. Several processes may, and none of them needs it to work."""
        text = "".join(f"{digest} {width} {height}\n" for digest, (width, height) in self.new.items())
        if not text:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="ascii") as file:
                file.write(text)
        except OSError:
            pass
