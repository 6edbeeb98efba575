"""Watches which way updates point, at the rollout's own guidance."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from callbacks.tensorboard import writers
from flow_rl.batches import Prompts
from flow_rl.models.workload import Drawing
from flow_rl.monitoring.update_direction import Probe, probe_gradient
from flow_rl.planning.demands import Demanding, Demands

_log = logging.getLogger(__name__)


class UpdateProbe(Callback, Demanding):
    """Logs the reward of fixed held-out prompts and noises before and a small step along the present gradient.

    The gradient is the one that the optimizer is about to use, so a probe costs two images a prompt and no rollout of
    its own. The first comes before any weight has changed: a check at start-up. Training goes on bit for bit as it
    would have without it.

    Logs `probe/before` and `probe/after` (points of 1..5), `probe/slope` (points per length of the step) and
    `probe/error` (the standard error of after - before). Several probes in a row whose reward does not rise, beyond
    what chance explains, are an alert in the log and in TensorBoard.

    Args:
        every: iterations between probes.
        step_size: length of the step in weight space (Euclidean norm): small against the weights, large against noise.
        prompts: how many validation prompts, spread evenly over the validation set.
        patience: how many probes in a row must point downhill for an alert.
        stop: whether an alert ends the run.
    """

    def __init__(
        self, every: int = 20, step_size: float = 0.1, prompts: int = 16, patience: int = 2, stop: bool = False
    ) -> None:
        for name, value, least in (("every", every, 1), ("prompts", prompts, 2), ("patience", patience, 1)):
            if value < least:
                raise ValueError(f"UpdateProbe {name} is {value}; it must be at least {least}.")
        if not step_size > 0:
            raise ValueError(f"UpdateProbe step_size is {step_size}; it must be above 0.")
        self.every, self.step_size, self.prompts = every, step_size, prompts
        self.patience, self.stop = patience, stop
        self.downhill = 0
        self._held_out: list[Prompts] = []
        self._last = -1

    @override
    def demands(self) -> Demands:
        drawing = Drawing(name="probe", prompts=self.prompts, keeps_latents=True, keeps_weights=True)
        return Demands(drawings=(drawing,))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.datamodule is None:
            raise ValueError("UpdateProbe takes its prompts from a datamodule's validation set: fit with a datamodule.")
        self._held_out = spread(trainer.datamodule.val_dataloader().dataset, self.prompts)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        iteration = pl_module.iteration
        if iteration % self.every or iteration == self._last:  # of several updates, the first
            return
        self._last = iteration
        with pl_module.clock.phase("probe"):
            probe = probe_gradient(pl_module, self._held_out, step_size=self.step_size)
        if probe is None:
            return
        values = {"before": probe.before.nanmean(), "after": probe.after.nanmean()}
        values |= {"slope": probe.slope, "error": probe.error}
        # Not by `log_dict`, which would write the last values again at every iteration without a probe.
        for logger in trainer.loggers:
            logger.log_metrics({f"probe/{name}": float(value) for name, value in values.items()}, step=iteration)
        # Every rank has the rewards of all prompts, so all of them decide alike.
        self.downhill = self.downhill + 1 if probe.not_uphill else 0
        if self.downhill >= self.patience:
            self._alert(trainer, iteration, probe)

    def _alert(self, trainer: Trainer, iteration: int, probe: Probe) -> None:
        message = (
            f"Iteration {iteration}: the update points the wrong way. Along the negative gradient the reward of "
            f"{len(probe.before)} held-out prompts goes from {float(probe.before.nanmean()):.3f} to "
            f"{float(probe.after.nanmean()):.3f} (standard error {probe.error:.3f}), probe {self.downhill} in "
            "a row. With guidance on a coarse last step a policy gradient can turn round: limit guidance to high noise "
            "(model.rollout.guidance.low), take more steps, or use the NFT objective."
        )
        if trainer.is_global_zero:
            _log.warning(message)
            for writer in writers(trainer):
                writer.add_text("probe/alert", message, iteration)
        if self.stop:
            trainer.should_stop = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"downhill": self.downhill}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.downhill = state_dict["downhill"]


def spread(batches: Sequence[Prompts], count: int) -> list[Prompts]:
    """About `count` prompts from a dataset of batches, evenly spread over it.

    Args:
        batches: the dataset, indexed by batch; only batches that are taken from are read.
        count: prompts.
    """
    chosen, number = [], len(batches)
    for position in range(number):
        share = (position + 1) * count // number - position * count // number
        if share:
            batch = batches[position]
            share = min(share, len(batch))
            chosen.append(batch.select([i * len(batch) // share for i in range(share)]))
    return chosen
