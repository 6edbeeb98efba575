"""Whole weights of modules that may be sharded, on the first rank: for writing them down."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def first_rank() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_sharded(module: nn.Module) -> bool:
    """Whether any of its weights is spread over the ranks."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole_state(module: nn.Module, *, part: str = "") -> dict[str, Tensor]:
    """The state dict with every tensor whole.

    Sharded tensors are gathered one by one, so every rank must ask; they are kept, on the CPU, on the first rank alone.

    Args:
        module: whose state.
        part: only tensors with this in their name.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if part not in name:
            continue
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first_rank():
            state[name] = gathered.detach().cpu() if isinstance(tensor, DTensor) else gathered.detach()
    return state
