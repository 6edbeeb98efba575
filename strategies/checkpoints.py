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
from torch.distributed.checkpoint import FileSystemWriter
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
    saving,
    write_meta,
)
from strategies.checkpoint_reading import SafeReader, check_shards, read_file


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
        with saving(path, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside(path).mkdir()
    barrier()
    with saving(path, partial):
        dcp.save(tensors, storage_writer=FileSystemWriter(partial))
    barrier()
    if is_first:
        with saving(path, partial):
            write_meta(partial, rest)
            put_in_place(partial, path)
    barrier()


def load_shards(path: Path, *, mesh: DeviceMesh | None, skip: Callable[[str], bool] | None = None) -> dict[str, Any]:
    """Read a directory of shards, whatever number of ranks wrote it.

    Args:
        path: of the directory.
        mesh: the ranks that every tensor is spread over, as FSDP2 does; None reads whole tensors.
        skip: of the entries at the top and, below `callbacks`, of each callback: which are not needed.

    Raises:
        ValueError: a checkpoint that is damaged, or that names more than a checkpoint may.
    """
    reader = SafeReader(path)
    metadata = reader.read_metadata()
    check_shards(path, metadata)
    rest = read_file(path / META)
    if skip is not None:
        for name in [name for name in rest if skip(name)]:
            del rest[name]
        for name in [name for name in rest.get("callbacks", {}) if skip(f"callbacks.{name}")]:
            del rest["callbacks"][name]
    known = metadata.state_dict_metadata
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
        # whatever the caller says of `weights_only`: a checkpoint may be a stranger's
        path = Path(path)
        return load_shards(path, mesh=None) if is_sharded_checkpoint(path) else read_file(path)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        remove(path)
