"""Checkpoints on disk that are either complete or not there.

A checkpoint is a file, or a directory of shards (torch's distributed checkpoint) with `meta.pt`, written last: its
presence says that the directory is complete. Everything is written under a temporary name beside the final one and
renamed, so a crash at any moment leaves the last complete checkpoint to be found, under its own name or the one that
it had while it was being replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

SUFFIX = ".ckpt"
META = "meta.pt"
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
    finished = [(_finished(path), str(path), path) for path in found if _finished(path) >= newer_than]
    return max(finished)[2] if finished else None


def _finished(path: Path) -> float:
    return (path / META if path.is_dir() else path).stat().st_mtime


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
    held = directory / (META + PARTIAL)
    _write(held, meta)
    os.replace(held, directory / META)
    _sync(directory)


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
    _sync(path.parent)


def save_file(checkpoint: Any, path: Path) -> None:
    """Write a checkpoint as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    _write(partial, checkpoint)
    put_in_place(partial, path)


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make names last through a power cut as well."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
