"""Read checkpoints that may be damaged, or a stranger's: nothing in them is executed, and every byte is checked.

A checkpoint is a pickle, and a pickle can call any function. Here it may name only what checkpoints of this project
hold: tensors and plain values. The ZIP that torch writes has a checksum for each of its members, which torch itself
does not compare.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from typing_extensions import override

from strategies.checkpoint_files import META, is_sharded_checkpoint

#: what a checkpoint may name beside what torch itself knows to be harmless
ALLOWED = (OrderedDict, defaultdict, dict, list, set, int, float)
#: the same for the table of a directory of shards, by module
_OF_SHARDS = {
    "torch.distributed.checkpoint.metadata": None,  # records alone
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "builtins": {"dict", "list", "set", "tuple"},
}
#: files whose every byte was compared, with their state then
_SOUND: set[tuple[str, int, int]] = set()
_SHOWN = "Use another checkpoint: --ckpt_path last takes the newest complete one of the run."


def check_readable(path: Path) -> None:
    """Refuse what is no checkpoint.

    Raises:
        ValueError: a directory that was not completed, or nothing.
    """
    if path.is_dir():
        if is_sharded_checkpoint(path):
            return
        raise ValueError(
            f"'{path}' is no complete checkpoint: it has no {META}, which is written last. Its save was cut short; "
            "resume from another one (--ckpt_path last finds the newest complete one)."
        )
    if not path.is_file():
        gone = f" (a link to '{path.readlink()}', which is not there)" if path.is_symlink() else ""
        raise ValueError(f"No checkpoint '{path}'{gone}.")


def read_file(path: Path, *, mmap: bool = False) -> Any:
    """The content of one file that `torch.save` wrote, on the CPU.

    Args:
        path: of the file.
        mmap: leave tensors on disk until they are used.

    Raises:
        ValueError: a file that is damaged, that is no checkpoint, or that names more than a checkpoint may.
    """
    check_readable(path)
    check_sound(path)
    with _refusing(path):
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def check_sound(path: Path) -> None:
    """Compare a file with its checksums, once as long as it does not change.

    Raises:
        ValueError: naming the member that differs, or saying that the file was cut short.
    """
    path = path.resolve()
    state = path.stat()
    key = (str(path), state.st_mtime_ns, state.st_size)
    if key in _SOUND:
        return
    with path.open("rb") as file:
        _compare(file, path)
    _SOUND.add(key)


def _compare(file: IO[bytes], path: Path, what: str = "") -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"'{path}'{what} is no complete checkpoint ({error}; {path.stat().st_size} bytes): it was cut short, or is "
            f"not a checkpoint. {_SHOWN}"
        ) from None
    if damaged is not None:
        raise ValueError(
            f"'{path}'{what} is damaged: the checksum of '{damaged}' does not match, so bytes have changed since it "
            f"was saved. {_SHOWN}"
        )


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Say what a pickle named that it must not, or that it is none."""
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|\(?['\"]([\w.]+)['\"]\)? (?:was not|is not) an allowed", str(error))
        name = found and (found[1] or found[2])
        if name is None:
            raise ValueError(f"'{path}' is no checkpoint: {str(error).splitlines()[0][:200]}") from None
        raise refused(path, name) from None
    except (EOFError, KeyError, IndexError, AttributeError, TypeError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no checkpoint: {type(error).__name__}: {str(error)[:200]}. {_SHOWN}") from None


def refused(path: Path, name: str) -> ValueError:
    """The error for a checkpoint that names what it must not."""
    return ValueError(
        f"'{path}' was refused, and nothing in it was executed: it names '{name}', and a checkpoint of this project "
        "holds tensors and plain values alone. Loading it otherwise would run its author's code."
    )


# ----------------------------------------------------------------- shards


class _TableUnpickler(pickle.Unpickler):
    """Reads the table of a directory of shards, which names records of torch alone."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    @override
    def find_class(self, module: str, name: str) -> Any:
        allowed = _OF_SHARDS.get(module, set())
        # A dotted name would reach through a module to whatever it has imported.
        if "." in name or (allowed is not None and name not in allowed):
            raise refused(self._path, f"{module}.{name}")
        found = super().find_class(module, name)
        if allowed is None and getattr(found, "__module__", None) != module:
            raise refused(self._path, f"{module}.{name}")
        return found


class SafeReader(FileSystemReader):
    """Torch's reader of shards, for directories that may be a stranger's."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as file:
                metadata = _TableUnpickler(file, path).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
            raise ValueError(f"'{path}' can't be read: {str(error)[:200]}. {_SHOWN}") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"'{path}' is not the table of a directory of shards. {_SHOWN}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def check_shards(path: Path, metadata: Metadata) -> None:
    """Compare every shard with its checksum, once as long as none changes.

    Raises:
        ValueError: a shard that is missing, cut short or damaged.
    """
    files = {info.relative_path for info in (metadata.storage_data or {}).values()}
    states = {name: (path / name).stat() for name in files if (path / name).is_file()}
    if missing := sorted(files - states.keys()):
        raise ValueError(f"'{path}' lacks '{missing[0]}': a part of the checkpoint is gone. {_SHOWN}")
    keys = {(str((path / name).resolve()), s.st_mtime_ns, s.st_size) for name, s in states.items()}
    if keys <= _SOUND:
        return
    for index, info in metadata.storage_data.items():
        with (path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            piece = file.read(info.length)
        _compare(io.BytesIO(piece), path / info.relative_path, f", {index.fqn},")
    _SOUND.update(keys)


def read_description(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, with its tensors left on disk; every byte is compared with its checksum.

    Raises:
        ValueError: see `read_file` and `check_shards`; a file that holds no training's state.
    """
    check_readable(path)
    if path.is_dir():
        check_shards(path, SafeReader(path).read_metadata())
    file = path / META if path.is_dir() else path
    content = read_file(file, mmap=True)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"'{path}' is no checkpoint of a training: it has no 'state_dict'. {_SHOWN}")
    return content
