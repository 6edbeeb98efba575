"""Fill a sharded model from what the first rank reads, one tensor at a time: no rank ever holds a whole copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flow_rl.distributed.gradients import exchange_device
from flow_rl.distributed.tensors import copy_into, like
from flow_rl.models.shard_units import ShardUnit
from flow_rl.models.stored import WeightReader


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the module has: parameters, and the buffers that are saved. Adapters are not in it."""
    state = module.state_dict(keep_vars=True)
    shared: set[int] = set()
    found = {}
    for name, tensor in state.items():
        if ".lora_" not in name and id(tensor) not in shared:
            found[name] = tensor
            shared.add(id(tensor))
    return found


def in_units(model: nn.Module, units: Sequence[ShardUnit]) -> dict[str, Tensor]:
    """Those of a model's stored tensors that are in one of the units, by their names in the model."""
    inside = {id(tensor) for unit in units for tensor in stored_tensors(unit.root).values()}
    return {name: tensor for name, tensor in stored_tensors(model).items() if id(tensor) in inside}


def fill(targets: Mapping[str, Tensor], reader: WeightReader) -> None:
    """Overwrite tensors, sharded or whole, with what the reader has under their names. Every rank calls it.

    Raises:
        ValueError: see `received`.
    """
    for name, whole in received(targets, reader):
        copy_into(targets[name].detach(), whole)


def own_pieces(targets: Mapping[str, Tensor], reader: WeightReader) -> dict[str, Tensor]:
    """This rank's pieces of what the reader has, laid out and of the dtype as the targets, on the CPU.

    Raises:
        ValueError: see `received`.
    """
    pieces = {}
    for name, whole in received(targets, reader):
        laid_out = like(whole, targets[name].detach())
        local = laid_out.to_local() if isinstance(laid_out, DTensor) else laid_out
        pieces[name] = local.detach().cpu().clone()
    return pieces


@torch.no_grad()
def received(targets: Mapping[str, Tensor], reader: WeightReader) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in turn, whole and of its target's dtype, on the device that ranks exchange tensors on.

    Raises:
        ValueError: on every rank, where the reader lacks a tensor or has one of another shape.
    """
    first, device = dist.get_rank() == 0, exchange_device()
    # Looked at by one and told to all before anything is sent: a rank that fails alone leaves the others waiting.
    complaint = [_complaint(targets, reader) if first else None]
    dist.broadcast_object_list(complaint, src=0)
    if complaint[0]:
        raise ValueError(complaint[0])
    try:
        for name, target in targets.items():
            whole = torch.empty(target.shape, dtype=target.dtype, device=device)
            if first:
                whole.copy_(reader.read(name))
            dist.broadcast(whole, src=0)
            yield name, whole
    finally:
        reader.close()


def _complaint(targets: Mapping[str, Tensor], reader: WeightReader) -> str | None:
    lacking = reader.missing(targets)
    if lacking:
        return (
            f"The model's files lack {len(lacking)} of its {len(targets)} tensors, such as {lacking[0]}: they are of "
            "another model, or incomplete."
        )
    for name, target in targets.items():
        if (stored := reader.shape(name)) != tuple(target.shape):
            return f"'{name}' has shape {stored} in the model's files; by its config it has {tuple(target.shape)}."
    return None
