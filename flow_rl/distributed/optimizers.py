"""Which optimizers cannot train sharded tensors, and why."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: packages whose optimizers are not for sharded tensors, and why
UNSHARDABLE = {
    "bitsandbytes": "whose kernels do not take sharded tensors (DTensors)",
    "torchao": "whose low-bit states do not come back from a checkpoint as they were where tensors are sharded "
    "(docs/distributed.md says what was tried)",
}


def why_unshardable(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> str | None:
    """What keeps an optimizer from sharded tensors, in a sentence that names it; None where nothing does.

    Args:
        make: makes the optimizer from a list of parameters.
    """
    kind = type(make([torch.nn.Parameter(torch.zeros(1))]))
    package = kind.__module__.split(".")[0]
    if package not in UNSHARDABLE:
        return None
    return f"model.optimizer is {package}'s {kind.__name__}, {UNSHARDABLE[package]}."
