"""Lets every reward score a few samples before training begins."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.written_images import tables
from flow_rl.distributed.shares import raised_everywhere
from flow_rl.rl.reward_trial import trial_prompts, trial_samples, try_rewards
from lightning_modules.image_module import ImageModule


class RewardTrial(Callback):
    """Ends a run before its first rollout where a reward raises, returns no scores, or does not answer.

    The command line adds it to every `fit`; `model.check_rewards=false` leaves it out. It runs where the rewards will
    be asked: on every rank, with images on the device that computes.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, ImageModule) or not pl_module.check_rewards:
            return
        device, size = pl_module.compute_device, pl_module.generator.size
        with raised_everywhere():
            for table in tables(trainer, "train"):
                samples = trial_samples(trial_prompts(table), size, device)
                try_rewards(pl_module.rewards, pl_module.asks, samples)
