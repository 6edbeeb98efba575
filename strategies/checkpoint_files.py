"""Checkpoints on disk that are either complete or not there.

A checkpoint is a file, or a directory of shards (torch's distributed checkpoint) with `meta.pt`, written last: its
presence says that the directory is complete. Everything is written under a temporary name beside the final one and
renamed, so a crash at any moment leaves the last complete checkpoint to be found, under its own name or the one that
it had while it was being replaced.
"""

from __future__ import annotations

import io
import os
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from typing_extensions import override

from flow_rl.errors import CannotWrite
from flow_rl.files import reason, replacing_file, sync

SUFFIX = ".ckpt"
META = "meta.pt"
#: before the time of saving, in the comment of a file's ZIP: the time of a file does not survive every copy
SAVED = b"saved "
#: being written
PARTIAL = ".partial"
#: the checkpoint of the same name that a new one takes the place of
REPLACED = ".replaced"


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether it is a complete directory of shards."""
    return path.is_dir() and (path / META).is_file()


def is_complete(path: Path) -> bool:
    """Whether it can be loaded: a file is, a directory if its last file was written."""
    return path.is_file() or is_sharded_checkpoint(path)


def newest_checkpoint(directories: Iterable[str | Path], *, newer_than: float = 0.0) -> Path | None:
    """The complete checkpoint that was finished last, or None.

    Args:
        directories: where to look; those that don't exist hold none.
        newer_than: leave out what was finished before this time, in seconds since the epoch.
    """
    found = {
        path.resolve()
        for directory in directories
        for path in Path(directory).glob(f"*{SUFFIX}")
        if is_complete(path)  # a link to what is gone is not
    }
    finished = [(_saved(path), str(path), path) for path in found if _finished(path) >= newer_than]
    return max(finished)[2] if finished else None


def _finished(path: Path) -> float:
    return (path / META if path.is_dir() else path).stat().st_mtime


def _saved(path: Path) -> float:
    """When a checkpoint was saved, in seconds since the epoch; a copy says the same. Else its file's time."""
    try:
        with zipfile.ZipFile(path / META if path.is_dir() else path) as archive:
            return float(archive.comment.removeprefix(SAVED))
    except (zipfile.BadZipFile, ValueError, OSError):
        return _finished(path)


def sweep(directory: str | Path) -> None:
    """Finish or undo the saves that a crash cut short. One process alone may call it, while none saves."""
    for path in sorted(Path(directory).glob(f"*{SUFFIX}{PARTIAL}")):
        final = path.with_name(path.name.removesuffix(PARTIAL))
        if is_sharded_checkpoint(path) and not is_complete(final):
            path.rename(final)  # complete but for its name
        else:
            remove(path)
    for path in sorted(Path(directory).glob(f"*{SUFFIX}{REPLACED}")):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if is_complete(path) and not is_complete(final):
            remove(final)
            path.rename(final)
        else:
            remove(path)


def remove(path: str | Path) -> None:
    """Delete a checkpoint; a directory stops counting as complete before anything else of it goes."""
    path = Path(path)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        (path / META).unlink(missing_ok=True)
        shutil.rmtree(path)


def beside(path: Path) -> Path:
    """The name to write under; nothing is there."""
    partial = path.with_name(path.name + PARTIAL)
    remove(partial)
    return partial


def write_meta(directory: Path, meta: Any) -> None:
    """Write the last file of a directory of shards: it is complete from here on."""
    with replacing_file(directory / META) as held:
        _write(held, meta)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a complete checkpoint its name, in the place of what has that name."""
    replaced = path.with_name(path.name + REPLACED)
    if path.is_symlink():
        path.unlink()
    if partial.is_file() and not path.is_dir():
        os.replace(partial, path)
    else:
        remove(replaced)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        remove(replaced)
    sync(path.parent)


def save_file(checkpoint: Any, path: Path) -> None:
    """Write a checkpoint as one file.

    Raises:
        CannotWrite: the disk refused; the checkpoint of that name is what it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    with saving(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path, partial=beside(path), put=put_in_place) as held:
            _write(held, checkpoint)


@contextmanager
def saving(path: Path, partial: Path) -> Iterator[None]:
    """Inside, an error of the disk ends in one message; what was written by then is taken away.

    Args:
        path: of the checkpoint.
        partial: what is written first.

    Raises:
        CannotWrite: naming the path, the reason and the last complete checkpoint.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, OSError) and _failures(error) is None:
            raise
        with suppress(OSError):
            remove(partial)
        cause = next((e for e in _chain(error) if isinstance(e, OSError)), error)
        kept = newest_checkpoint([path.parent])
        left = "There is no complete checkpoint yet." if kept is None else f"The last complete one is '{kept}'."
        raise CannotWrite(
            f"Can't write the checkpoint '{path}': {reason(cause)}. {left} Free space, or set --run.dir to another "
            "disk, and resume with --ckpt_path last."
        ) from error


def _failures(error: BaseException) -> Mapping[int, Any] | None:
    """What went wrong on each rank, for an error of a sharded checkpoint."""
    # its import takes a second, and every start imports this file
    from torch.distributed.checkpoint.api import CheckpointException

    return error.failures if isinstance(error, CheckpointException) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    for raised, _ in (_failures(error) or {}).values():
        yield from _chain(raised)
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


class _Watched(io.RawIOBase):
    """A file that remembers why a write failed: torch's own error has neither path nor reason."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    @override
    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        watched = _Watched(file)
        try:
            torch.save(content, watched)
        except RuntimeError as error:
            if watched.error is None:
                raise
            raise watched.error from error
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = SAVED + repr(time.time()).encode()
