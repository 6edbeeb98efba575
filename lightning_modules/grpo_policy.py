"""GRPO on a flow-matching image model, with the rollouts inside the training step.

One step: G images a prompt are rolled out under guidance -> rewards -> advantages in the group -> one or several
updates whose objective sees the conditional branch alone (hybrid guidance, arXiv 2606.27608, section 3).

Shapes: P prompts, G images a prompt, N = P G samples, K rewards.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from typing_extensions import override

from datamodules.batches import Prompts
from flow.advantages import group_advantages
from flow.rollout import Trajectory
from lightning_modules.evaluation_steps import EvaluationSteps
from lightning_modules.objectives import OBJECTIVES, Objective, Rollout, micro_batches
from lightning_modules.phases import PhaseClock
from lightning_modules.sampling import Sampler, group_rollout
from lightning_modules.scoring import check_weights, reward_metrics, score_all
from lightning_modules.settings import (
    LoraSettings,
    ObjectiveSettings,
    RolloutSettings,
    check_optimizer,
    check_positive,
    check_settings,
)
from lightning_modules.shadow import ShadowWeights
from lightning_modules.windows import check_window, steps_of_iteration
from models import ImageModel, load_image_model
from models.adapters import add_lora
from models.loading import peek_sigmas
from models.memory import FrozenDtype, save_memory
from rewards import Reward, Samples


class GRPOPolicy(EvaluationSteps, LightningModule):
    """Trains a generator's transformer to raise its rewards.

    Args:
        model_path: the base, a directory in the diffusers layout.
        image_size: height and width in pixels.
        rewards: scorers by name, each on the scale 1..5.
        optimizer: of the trainable weights.
        reward_weights: by reward name, non-negative, summing to 1; equal if none are given.
        judges: scorers used by `test` alone, by name. Never part of training.
        rollout: how images are made.
        objective: what an update minimises.
        lora: train an adapter of this kind; None trains all the transformer's weights.
        frozen_dtype: of weights that are not trained: the text encoder and, under an adapter, the transformer.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        gradient_clip: largest gradient norm.
        test_members: images a prompt in `test` and `predict`.
        seed: of noise, windows and noise levels.
    """

    def __init__(
        self,
        model_path: str,
        image_size: int,
        rewards: dict[str, Reward],
        optimizer: OptimizerCallable,
        reward_weights: dict[str, float] | None = None,
        judges: dict[str, Reward] | None = None,
        rollout: RolloutSettings = RolloutSettings(),  # noqa: B008  (frozen)
        objective: ObjectiveSettings = ObjectiveSettings(),  # noqa: B008
        lora: LoraSettings | None = None,
        frozen_dtype: FrozenDtype = "float32",
        gradient_checkpointing: bool = False,
        gradient_clip: float = 1.0,
        test_members: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Everything that can be refused is refused here, before a model loads.
        sigmas = peek_sigmas(model_path, max(rollout.num_steps, 1), image_size=(image_size, image_size))
        check_settings(rollout, objective, last_sigma=float(sigmas[-2]))
        check_window(rollout, objective)
        check_optimizer(optimizer)
        check_positive(gradient_clip=gradient_clip, test_members=test_members)
        self.model_path = model_path
        self.image_size = image_size
        self.rewards = rewards
        self.reward_weights = check_weights(rewards, reward_weights)
        self.judges = judges or {}
        self.rollout_settings = rollout
        self.objective_settings = objective
        self.lora = lora
        self.frozen_dtype: FrozenDtype = frozen_dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.gradient_clip = gradient_clip
        self.test_members = test_members
        self.seed = seed
        self.make_optimizer = optimizer
        self.clock = PhaseClock()
        self.iteration = 0
        self.skipped = 0
        self.model: ImageModel | None = None

    # ----------------------------------------------------------------- set-up

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        model = load_image_model(self.model_path, image_size=(self.image_size, self.image_size))
        sigmas = model.sigmas(self.rollout_settings.num_steps)
        if self.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)  # the same adapter on every rank and after every restart
                add_lora(model.transformer, **vars(self.lora), targets=model.lora_targets)
        else:
            model.transformer.requires_grad_(True)
        save_memory(model, frozen_dtype=self.frozen_dtype, gradient_checkpointing=self.gradient_checkpointing)
        self.model = model
        self.sampler = Sampler(
            sigmas=sigmas,
            guidance=self.rollout_settings.guidance,
            size=(self.image_size, self.image_size),
            seed=self.seed,
        )
        self.objective: Objective = OBJECTIVES[self.objective_settings.kind](
            self.rollout_settings, self.objective_settings
        )
        self.old = ShadowWeights(model.transformer) if self.objective.uses_old_policy else None
        self.reference = ShadowWeights(model.transformer) if self.objective.uses_reference else None

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([p for p in self.model.transformer.parameters() if p.requires_grad])

    # ----------------------------------------------------------------- one iteration

    @override
    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        self.model.transformer.train()
        rollout, images = self._roll_out(batch)
        with self.clock.phase("reward"):
            scores, advantages = self._score(batch, images)
        with self.clock.phase("update"):
            updates = self._update(rollout, advantages)
        self._log_iteration(batch, scores, advantages, updates)
        self.iteration += 1

    def _roll_out(self, batch: Prompts) -> tuple[Rollout, Tensor]:
        """Images of every group, and what the updates need of how they came about."""
        settings = self.rollout_settings
        steps: tuple[int, ...] = ()
        if self.objective.uses_window:
            steps = steps_of_iteration(settings.window, settings.num_steps, iteration=self.iteration, seed=self.seed)
        with self.clock.phase("rollout"), torch.no_grad():
            with nullcontext() if self.old is None else self.old.applied():
                trajectory = self._trajectory(batch, steps)
            images = self.model.decode(trajectory.latents)
            group = settings.group_size
            conditioning = self.model.encode(batch.texts, batch.sources).repeat_interleave(group)
            unconditional = None
            if settings.cfg == "both":
                blank = self.model.encode([""] * len(batch), batch.sources)
                unconditional = blank.repeat_interleave(group)
        self.clock.images += images.shape[0]
        rollout = Rollout(
            prompts=batch,
            trajectory=trajectory,
            sigmas=self.sampler.sigmas,
            conditioning=conditioning,
            unconditional=unconditional,
            members=tuple(range(group)) * len(batch),
            iteration=self.iteration,
            seed=self.seed,
        )
        return rollout, images

    def _trajectory(self, batch: Prompts, steps: tuple[int, ...]) -> Trajectory:
        settings = self.rollout_settings
        per_batch = max(1, settings.batch_size // settings.group_size)
        parts = [
            group_rollout(
                self.model,
                self.sampler,
                part,
                group_size=settings.group_size,
                step=self.iteration,
                transition=settings.transition,
                noise_level=settings.noise_level,
                stochastic_steps=steps,
                shared_noise=settings.shared_noise,
            )
            for part in batch.parts(per_batch)
        ]
        return Trajectory(
            latents=torch.cat([p.latents for p in parts]),
            states=torch.cat([p.states for p in parts], dim=1),
            next_states=torch.cat([p.next_states for p in parts], dim=1),
            steps=parts[0].steps,
        )

    def _score(self, batch: Prompts, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw scores (N, K) and advantages (N,)."""
        group = self.rollout_settings.group_size
        repeated = batch.repeat_interleave(group)
        samples = Samples(
            images=images, prompts=repeated.texts, categories=repeated.categories, sources=repeated.sources
        )
        scores = score_all(self.rewards, samples)
        weights = torch.tensor(list(self.reward_weights.values())).expand(len(samples), -1)
        settings = self.objective_settings
        advantages = group_advantages(
            scores,
            torch.tensor(repeated.ids),
            weights,
            std_floor=settings.std_floor,
            clip=settings.advantage_clip,
        )
        return scores, advantages

    # ----------------------------------------------------------------- updates

    def _update(self, rollout: Rollout, advantages: Tensor) -> list[dict[str, Tensor]]:
        """All optimizer steps of one rollout; the metrics of each."""
        metrics = []
        prepared = [self._prepare(rollout, update) for update in range(self.objective_settings.updates)]
        for update in range(self.objective_settings.updates):
            # A policy gradient prepares once, before its first update: the old values serve them all.
            metrics.append(self.update_once(rollout, advantages, prepared[update] or prepared[0]))
        if self.old is not None:
            growth = self.objective_settings.old_decay_growth * (self.iteration + 1)
            self.old.blend(min(growth, self.objective_settings.old_decay))
        return metrics

    def _prepare(self, rollout: Rollout, update: int) -> dict[str, Tensor]:
        with nullcontext() if self.old is None else self.old.applied():
            prepared = self.objective.prepare(self.model, rollout, update)
        if self.reference is not None:
            with self.reference.applied():
                prepared |= self.objective.prepare_reference(self.model, rollout, prepared)
        return prepared

    def accumulate_gradients(
        self, rollout: Rollout, advantages: Tensor, prepared: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Backward micro-batch by micro-batch; returns the metrics of the whole batch."""
        samples, steps = len(rollout.conditioning), self.objective.steps_a_sample(rollout)
        collected: list[tuple[int, dict[str, Tensor]]] = []
        total = torch.zeros(())
        for pairs in micro_batches(samples, steps, self.objective_settings.micro_batch_size):
            loss, metrics = self.objective.loss(
                self.model, rollout, advantages, pairs, prepared, denominator=samples * steps
            )
            self.manual_backward(loss)
            total = total + loss.detach().cpu()
            collected.append((len(pairs), metrics))
        return {"loss": total} | _weighted_means(collected)

    def update_once(self, rollout: Rollout, advantages: Tensor, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimizer step, skipped (and counted) where the gradient is not finite."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        metrics = self.accumulate_gradients(rollout, advantages, prepared)
        trainable = [p for p in self.model.transformer.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trainable, self.gradient_clip)
        metrics["gradient_norm"] = norm.detach().cpu()
        if torch.isfinite(norm) and torch.isfinite(metrics["loss"]):
            optimizer.step()
            self.skipped = 0
        else:
            self._skip()
        return metrics

    def _skip(self) -> None:
        self.optimizers().zero_grad()
        self.skipped += 1
        if self.skipped >= self.objective_settings.max_skipped:
            raise RuntimeError(
                f"Stopped at iteration {self.iteration}: {self.skipped} updates in a row had a loss or gradient that "
                "is not finite. Lower the learning rate, or look at the rewards of the last iterations."
            )

    # ----------------------------------------------------------------- logging and state

    def _log_iteration(
        self, batch: Prompts, scores: Tensor, advantages: Tensor, updates: list[dict[str, Tensor]]
    ) -> None:
        repeated = batch.repeat_interleave(self.rollout_settings.group_size)
        values = reward_metrics(
            self.rewards, self.reward_weights, scores, torch.tensor(repeated.ids), repeated.categories
        )
        values["advantage/abs_mean"] = advantages.abs().mean().item()
        for key in updates[0]:
            values[f"update/{key}"] = float(torch.stack([u[key].float().cpu() for u in updates]).mean())
        values["update/skipped_in_a_row"] = float(self.skipped)
        self.log_dict(values, batch_size=len(batch))
        self.log("reward", values["reward/mean"], prog_bar=True, logger=False, batch_size=len(batch))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        prefix, trainable = "model.transformer.", dict(self.model.transformer.named_parameters())
        kept = {prefix + name for name, p in trainable.items() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["grpo"] = {"iteration": self.iteration, "skipped": self.skipped}
        for name in ("old", "reference"):
            shadow = getattr(self, name)
            if shadow is not None:
                checkpoint["grpo"][name] = shadow.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.strict_loading = False  # frozen weights come from model_path, not from the checkpoint
        self.configure_model()
        state = checkpoint["grpo"]
        self.iteration, self.skipped = state["iteration"], state["skipped"]
        for name in ("old", "reference"):
            if getattr(self, name) is not None and name in state:
                getattr(self, name).load_state_dict(state[name])

    def export(self, path: str | Path) -> None:
        """Write the trained generator in the diffusers layout."""
        self.model.save_pretrained(path)


def _weighted_means(collected: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Mean of each metric over pairs; a maximum where its name says so."""
    total = sum(count for count, _ in collected)
    means: dict[str, Tensor] = {}
    for name in collected[0][1]:
        values = [(count, metrics[name].float().cpu()) for count, metrics in collected]
        if name.endswith("_max"):
            means[name] = torch.stack([value for _, value in values]).max()
        else:
            means[name] = sum((value * count for count, value in values), torch.zeros(())) / total
    return means
