"""What does not work on several ranks, said before a model loads."""

from __future__ import annotations

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


def check_sharded_optimizer(module: LightningModule) -> None:
    """Optimizers whose kernels can't take sharded tensors.

    Raises:
        ValueError: bitsandbytes.
    """
    make = getattr(module, "make_optimizer", None)
    if make is None:
        return
    kind = type(make([torch.nn.Parameter(torch.zeros(1))]))
    if kind.__module__.split(".")[0] == "bitsandbytes":
        raise ValueError(
            f"model.optimizer is bitsandbytes' {kind.__name__}, whose kernels do not take FSDP2's sharded tensors "
            "(DTensors). Use torch.optim.AdamW, whose state is sharded anyway, or configs/strategy/ddp.yaml or "
            "single.yaml, where weights are whole."
        )
