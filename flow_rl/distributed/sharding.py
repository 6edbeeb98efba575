"""FSDP2 on the parts of a model, and holding them whole for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flow_rl.models.shard_units import ShardUnit


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How weights are laid out.

    Attributes:
        mesh: the ranks, one dimension.
        compute_dtype: of weights and activations in a forward; None leaves them as they are.
        cpu_offload: keep the shards, their gradients and the optimizer's state in CPU memory.
    """

    mesh: DeviceMesh
    compute_dtype: torch.dtype | None = None
    cpu_offload: bool = False


def shard(model: nn.Module, units: Sequence[ShardUnit], layout: Layout) -> None:
    """Shard each unit of a model in place, its blocks first.

    Weights may be on the meta device: then the shards are made, and hold nothing yet. Shards keep the dtype that was
    loaded (fp32 masters); a forward computes in `compute_dtype`; gradients are reduced
    in float32. Only what enters a unit is cast: inside, rotary tables and the like keep their precision.
    """
    offload = OffloadPolicy()
    if layout.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=layout.mesh.device_type != "cpu")
    reduce_dtype = None if layout.compute_dtype is None else torch.float32
    before = [_places(unit.root) for unit in units]
    device = _resting_device(layout)
    for unit in units:
        for module in (*unit.blocks, unit.root):
            inside = MixedPrecisionPolicy(
                param_dtype=layout.compute_dtype,
                reduce_dtype=reduce_dtype,
                cast_forward_inputs=module is unit.root,
            )
            fully_shard(
                module,
                mesh=layout.mesh,
                mp_policy=inside,
                offload_policy=offload,
                # The root's own weights are needed first in the backward pass: they stay.
                reshard_after_forward=module is not unit.root,
            )
            # The stubs of nn.Module know tensors and modules as attributes, and no others.
            module.reshards_after_forward = module is not unit.root  # type: ignore[assignment]
        _materialise(unit.root, device)
    _tie(model, before)


def _resting_device(layout: Layout) -> torch.device:
    if layout.cpu_offload or layout.mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(layout.mesh.device_type, torch.accelerator.current_device_index())


def _materialise(root: nn.Module, device: torch.device) -> None:
    """Give shards that have no memory yet some, for somebody to fill. Everything else stays as it is."""
    if any(p.is_meta for p in root.parameters()):
        root._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def _places(root: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [(module, name, p) for module in root.modules() for name, p in module.named_parameters(recurse=False)]


def _tie(model: nn.Module, before: list[list[tuple[nn.Module, str, nn.Parameter]]]) -> None:
    """Weights that a module outside of the units shares with one inside are the shards now."""
    shards = {id(old): module._parameters[name] for places in before for module, name, old in places}
    for module, name, parameter in _places(model):
        if id(parameter) in shards:
            module._parameters[name] = shards[id(parameter)]


def gather(module: nn.Module) -> None:
    """Make every sharded part whole until `release`: forwards and backwards then gather no weights.

    One all-gather serves a whole rollout, and ranks may differ in the number of forwards they make. It takes the
    weights as they are now, so swap others in before, not inside. Nothing happens to a module that isn't sharded.
    """
    for part in _parts(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.unshard()


def release(module: nn.Module) -> None:
    """Give the whole weights up again; the shards, which the optimizer steps on, are what is left."""
    for part in _parts(module):
        part.reshard()
        kept = part.reshards_after_forward  # type: ignore[attr-defined]  # set where the part was sharded
        part.set_reshard_after_forward(kept, recurse=False)
        part.set_reshard_after_backward(True, recurse=False)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """See `gather`; released at the end of the block, whatever happens there."""
    gather(module)
    try:
        yield
    finally:
        release(module)


def reduce_gradients(module: nn.Module, *, now: bool) -> None:
    """Whether the backward passes to come send sharded gradients to their ranks, or keep whole ones until later."""
    for part in _parts(module):
        part.set_requires_gradient_sync(now, recurse=False)


def _parts(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))
