"""What does not work on several ranks, said before a model loads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning import LightningModule, Trainer


def check_sampler(trainer: Trainer) -> None:
    """Lightning's own sampler would cut up batches that the data modules have shared out already.

    Raises:
        ValueError: it is on.
    """
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            "trainer.use_distributed_sampler is true, but the data modules share their batches over the ranks "
            "themselves. Set it to false (configs/strategy/*.yaml do)."
        )


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


def check_sharded_optimizer(module: LightningModule) -> None:
    """Optimizers that can't be used on sharded tensors.

    Raises:
        ValueError: bitsandbytes or torchao.
    """
    make = getattr(module, "make_optimizer", None)
    reason = None if make is None else why_unshardable(make)
    if reason is not None:
        raise ValueError(
            f"{reason} Use torch.optim.AdamW, whose state is sharded anyway, or bitsandbytes' AdamW8bit with "
            "configs/strategy/ddp.yaml or single.yaml, where weights are whole."
        )
