"""What does not work on several ranks, said before a model loads."""

from __future__ import annotations

from lightning import LightningModule, Trainer

from flow_rl.distributed.optimizers import why_unshardable


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
