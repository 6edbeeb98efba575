"""Save and load a trainer's checkpoint, whole or in shards, on any number of ranks.

The content is the same nested dict either way. Saving in shards cuts the sharded tensors out of it, wherever they are
(weights, optimizer, EMA, old policy), and writes each rank's pieces with torch's distributed checkpoint; the
rest goes into `meta.pt`. Loading lays every tensor out anew for the ranks that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from flow_rl.distributed.tensors import piece, put_back, references, set_apart, sharded
from strategies.checkpoint_files import (
    META,
    PARTIAL,
    beside,
    is_sharded_checkpoint,
    put_in_place,
    remove,
    save_file,
    write_meta,
)


def save_shards(checkpoint: dict[str, Any], path: Path, *, is_first: bool, barrier: Callable[[], None]) -> None:
    """Write a directory of shards; every rank calls it.

    Args:
        checkpoint: nested, with sharded tensors anywhere.
        path: of the directory, the same on every rank, on a disk that all of them see.
        is_first: whether this rank does what is done once.
        barrier: waits for all ranks.
    """
    rest, tensors = set_apart(checkpoint)
    partial = path.with_name(path.name + PARTIAL)
    if is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside(path).mkdir()
    barrier()
    dcp.save(tensors, storage_writer=FileSystemWriter(partial))
    barrier()
    if is_first:
        write_meta(partial, rest)
        put_in_place(partial, path)
    barrier()


def load_shards(
    path: Path, *, mesh: DeviceMesh | None, weights_only: bool = False, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read a directory of shards, whatever number of ranks wrote it.

    Args:
        path: of the directory.
        mesh: the ranks that every tensor is spread over, as FSDP2 does; None reads whole tensors.
        weights_only: see `torch.load`; for `meta.pt`.
        skip: top-level entries whose tensors are not needed.
    """
    rest = torch.load(path / META, map_location="cpu", weights_only=weights_only)
    for name in skip:
        rest.pop(name, None)
    reader = FileSystemReader(path)
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for place in references(rest):
        size, dtype = known[place].size, known[place].properties.dtype
        whole = torch.empty(size, dtype=dtype, device="meta")
        if mesh is None:
            tensors[place] = torch.empty_like(whole, device="cpu")
        else:
            tensors[place] = sharded(torch.empty_like(piece(whole, mesh), device="cpu"), size, mesh)
    if tensors:
        dcp.load(tensors, storage_reader=reader, no_dist=mesh is None)
    return put_back(rest, tensors)


class AtomicCheckpointIO(CheckpointIO):
    """One file a checkpoint, complete or not there; reads directories of shards as well."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_file(checkpoint, Path(path))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        if is_sharded_checkpoint(path):
            return load_shards(path, mesh=None, weights_only=bool(weights_only))
        check_readable(path)
        return torch.load(path, map_location="cpu", weights_only=bool(weights_only))

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        remove(path)


def check_readable(path: Path) -> None:
    """Refuse what is no checkpoint.

    Raises:
        ValueError: a directory that was not completed, or nothing.
    """
    if path.is_dir():
        raise ValueError(
            f"'{path}' is no complete checkpoint: it has no {META}, which is written last. Its save was cut short; "
            "resume from another one (--ckpt_path last finds the newest complete one)."
        )
    if not path.is_file():
        raise ValueError(f"No checkpoint '{path}'.")
