"""GRPO on a flow-matching image model, with the rollouts inside the training step.

One step: G images a prompt are rolled out under guidance -> rewards -> advantages in the group -> one or several
updates whose objective sees the conditional branch alone (hybrid guidance, arXiv 2606.27608, section 3).

A step is made in pieces, groups that are rolled out together. A piece's images go to the rewards as soon as they are
decoded, and the next piece rolls out meanwhile; then, piece by piece, its scores are waited for and its gradients
accumulate while the later ones are still being scored. Weights change once all of them are in: nothing is stale.

Shapes: P prompts, G images a prompt, N = P G samples, K rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from typing_extensions import override

from flow_rl.batches import PromptData, Prompts, TaskBatches
from flow_rl.distributed.gradients import over_ranks
from flow_rl.distributed.sharding import gathered
from flow_rl.flow.windows import steps_of_iteration
from flow_rl.models import ImageModel, load_image_model
from flow_rl.models.adapters import LoraSettings
from flow_rl.models.compilation import compile_blocks
from flow_rl.models.loading import peek_sigmas
from flow_rl.models.memory import FrozenDtype, WeightDtypes
from flow_rl.models.workload import Workload
from flow_rl.planning.stage import Profile
from flow_rl.rewards import Reward
from flow_rl.rl.advantage_estimator import Advantages, AdvantageSettings, Outcome, Scored
from flow_rl.rl.iteration import Iteration, Piece
from flow_rl.rl.objectives import OBJECTIVES, Rollout
from flow_rl.rl.phases import PhaseClock
from flow_rl.rl.reward_metrics import reward_metrics, update_means
from flow_rl.rl.reward_weights import FixedWeights, GroupGate, WeightSource, weights_by_task
from flow_rl.rl.sampling import Sampler, group_rollout
from flow_rl.rl.score_queue import PendingScores
from flow_rl.rl.scoring import samples_of
from flow_rl.rl.settings import ObjectiveSettings, RolloutSettings
from flow_rl.rl.settings_checks import check_settings
from flow_rl.rl.shadow_weights import ShadowWeights, reference_weights
from flow_rl.rl.silent_rewards import SilentRewards
from flow_rl.rl.workload import policy_workload
from lightning_modules.base import check_optimizer, check_positive
from lightning_modules.image_module import EvaluationSteps
from lightning_modules.updates import PolicyUpdates
from strategies import distribute, is_sharded_run


class GRPOPolicy(PolicyUpdates, EvaluationSteps):
    """Trains a generator's transformer to raise its rewards.

    Args:
        model_path: the base, a directory in the diffusers layout.
        image_size: height and width in pixels.
        rewards: scorers by name, each on the scale 1..5.
        optimizer: of the trainable weights.
        lr_scheduler: stepped after every optimizer step; None keeps the rate.
        reward_weights: by reward name, non-negative, summing to 1; or such weights for each task (`t2i`, `edit`), where
            a reward that a task does not name is not asked about that task's samples. Equal if none are given.
        judges: scorers used by `test` alone, by name. Never part of training.
        monitors: scorers that are watched in training, by name, and never part of the loss.
        rollout: how images are made.
        objective: what an update minimises.
        advantages: how several rewards become one advantage.
        lora: train an adapter of this kind; None trains all the transformer's weights.
        frozen_dtype: of weights that are not trained: the text encoder and, under an adapter, the transformer.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        compile_blocks: compile the transformer's blocks (`torch.compile`). The first iteration takes minutes longer.
        gradient_clip: largest gradient norm.
        test_members: images a prompt in `test` and `predict`.
        seed: of noise, windows and noise levels.
    """

    suspects = "the rewards"

    def __init__(
        self,
        model_path: str,
        image_size: int,
        rewards: dict[str, Reward],
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        reward_weights: dict[str, float | dict[str, float]] | None = None,
        judges: dict[str, Reward] | None = None,
        monitors: dict[str, Reward] | None = None,
        rollout: RolloutSettings = RolloutSettings(),  # noqa: B008  (frozen)
        objective: ObjectiveSettings = ObjectiveSettings(),  # noqa: B008
        advantages: AdvantageSettings = AdvantageSettings(),  # noqa: B008
        lora: LoraSettings | None = None,
        frozen_dtype: FrozenDtype = "float32",
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        gradient_clip: float = 1.0,
        test_members: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Everything that can be refused is refused here, before a model loads.
        sigmas = peek_sigmas(model_path, max(rollout.num_steps, 1), image_size=(image_size, image_size))
        check_settings(rollout, objective, sigmas.tolist(), lora)
        check_optimizer(optimizer, lr_scheduler)
        check_positive(gradient_clip=gradient_clip, test_members=test_members)
        self.model_path = model_path
        self.image_size = image_size
        self.rewards = rewards
        self.reward_weights = weights_by_task(list(rewards), reward_weights)
        self.weight_source: WeightSource = FixedWeights(self.reward_weights)
        self.gates: list[GroupGate] = []
        self.judges = judges or {}
        self.monitors = monitors or {}
        self.rollout_settings = rollout
        self.objective_settings = objective
        self.advantage_settings = advantages
        self.lora = lora
        self.frozen_dtype: FrozenDtype = frozen_dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile_blocks
        self.gradient_clip = gradient_clip
        self.test_members = test_members
        self.seed = seed
        self.make_optimizer = optimizer
        self.make_scheduler = lr_scheduler
        self.clock = PhaseClock()
        self.iteration = 0
        self.skipped = 0
        self.last_iteration: Iteration | None = None
        self._silent = SilentRewards(objective.max_skipped)
        self.model: ImageModel | None = None

    # ----------------------------------------------------------------- what it takes

    @override
    def profile(self) -> Profile:
        guidances = {"model.rollout.guidance.scale": self.rollout_settings.guidance}
        return replace(
            super().profile(),
            updates=self.objective_settings.updates,
            num_steps={"model.rollout.num_steps": self.rollout_settings.num_steps},
            guidances=guidances,
            drawn_guidances=guidances,
            rewards=self.rewards,
            monitors=self.monitors,
            trained_on={
                task: [n for n, w in weights.items() if w > 0] for task, weights in self.reward_weights.items()
            },
        )

    @override
    def workload(self, data: PromptData | None, *, ranks: int) -> Workload:
        return policy_workload(
            model_path=self.model_path,
            image_size=self.image_size,
            rollout=self.rollout_settings,
            objective=self.objective_settings,
            adapter=self.lora is not None,
            data=data,
            ranks=ranks,
        )

    # ----------------------------------------------------------------- set-up

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        size = (self.image_size, self.image_size)
        dtypes = WeightDtypes.kept(self.frozen_dtype, adapter=self.lora is not None)
        model = load_image_model(self.model_path, image_size=size, dtypes=dtypes, empty=is_sharded_run(self))
        sigmas = model.sigmas(self.rollout_settings.num_steps)
        self.choose_trained(model)
        if self.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        if self.compile_blocks:
            compile_blocks(model)
        model.uniform_forwards = distribute(self, model, model.shard_units(), model.stored)
        self.model = model
        self.sampler = Sampler(
            sigmas=sigmas,
            guidance=self.rollout_settings.guidance,
            size=size,
            seed=self.seed,
            batch_size=self.rollout_settings.batch_size,
        )
        self.objective = OBJECTIVES[self.objective_settings.kind](self.rollout_settings, self.objective_settings)
        self.old = ShadowWeights(model.transformer) if self.objective.uses_old_policy else None
        self.reference = None
        if self.objective.uses_reference:
            self.reference = reference_weights(model.transformer, adapter=self.lora is not None)

    # ----------------------------------------------------------------- one iteration

    @override
    def training_step(self, batch: Prompts | TaskBatches, batch_idx: int) -> None:
        self.model.transformer.train()
        self.last_iteration = None  # its images and latents make room for the next ones
        parts = batch.parts if isinstance(batch, TaskBatches) else (batch,)
        with PendingScores(self.rewards, self.clock) as pending:
            pieces = [self._begin(number, prompts, pending) for number, prompts in self._cut(parts)]
            outcomes, updates = self._update(pieces)
        self.last_iteration = Iteration.of(self.iteration, parts, pieces, outcomes, list(self.rewards))
        self._log_iteration(self.last_iteration, updates)
        self.iteration += 1

    def _cut(self, parts: Sequence[Prompts]) -> Iterator[tuple[int, Prompts]]:
        """Prompts of each piece, with the number of the part they belong to."""
        size = max(1, self.rollout_settings.batch_size // self.rollout_settings.group_size)
        for number, part in enumerate(parts):
            for prompts in part.parts(size):
                yield number, prompts

    def _begin(self, part: int, prompts: Prompts, pending: PendingScores) -> Piece:
        """Make a piece's images and submit them. Only what the updates need of them stays on the device."""
        rollout, images = self.roll_out(prompts)
        scored = self._submit(prompts, images, pending)
        return Piece(part=part, rollout=rollout, images=images.cpu(), scored=scored)

    def roll_out(self, prompts: Prompts) -> tuple[Rollout, Tensor]:
        """Images (N, 3, H, W) of every group, and what the updates need of how they came about."""
        settings, group = self.rollout_settings, self.rollout_settings.group_size
        steps: tuple[int, ...] = ()
        if self.objective.uses_window:
            steps = steps_of_iteration(settings.window, settings.num_steps, iteration=self.iteration, seed=self.seed)
        with self.clock.phase("rollout"), torch.no_grad():
            branches = self.sampler.encode(self.model, prompts.texts, prompts.sources)
            # Gathered once for all steps, and after the swap, as it takes the weights that are there.
            with self.old_weights(), gathered(self.model.transformer):
                trajectory = group_rollout(
                    self.model,
                    self.sampler,
                    prompts,
                    branches,
                    group_size=group,
                    step=self.iteration,
                    transition=settings.transition,
                    noise_level=settings.noise_level,
                    stochastic_steps=steps,
                    shared_noise=settings.shared_noise,
                )
            images = self.model.decode(trajectory.latents)
        self.clock.images += images.shape[0]
        seen = branches.repeat_interleave(group)
        rollout = Rollout(
            prompts=prompts,
            trajectory=trajectory,
            sigmas=self.sampler.sigmas,
            conditioning=seen.conditional,
            unconditional=seen.unconditional if settings.cfg == "both" else None,
            members=tuple(range(group)) * len(prompts),
            iteration=self.iteration,
            seed=self.seed,
        )
        return rollout, images

    # ----------------------------------------------------------------- scores

    @override
    def asks(self, name: str, task: str) -> bool:
        return name not in self.rewards or name in self.reward_weights.get(task, ())

    def _submit(self, prompts: Prompts, images: Tensor, pending: PendingScores) -> Scored:
        """Send the images of every group to the rewards of their task."""
        repeated = prompts.repeat_interleave(self.rollout_settings.group_size)
        asked = [name for name in self.rewards if self.asks(name, prompts.task)]
        scores = pending.submit(samples_of(repeated, images), asked)
        return Scored(prompts=prompts.to(torch.device("cpu")), members=self.rollout_settings.group_size, scores=scores)

    def _outcomes(self, scored: Sequence[Scored]) -> Iterator[Outcome]:
        """Scores and advantages, each piece's as soon as it can be had."""
        advantages = Advantages(
            self.advantage_settings,
            self.objective_settings,
            reward_names=list(self.rewards),
            weight_source=self.weight_source,
            gates=self.gates,
        )
        return advantages.in_turn(scored)

    def score(self, prompts: Prompts, images: Tensor) -> Outcome:
        """Score the images (N, 3, H, W) of one batch of groups at once."""
        with PendingScores(self.rewards, self.clock) as pending:
            return next(self._outcomes([self._submit(prompts, images, pending)]))

    # ----------------------------------------------------------------- updates

    def _update(self, pieces: Sequence[Piece]) -> tuple[list[Outcome], list[dict[str, Tensor]]]:
        """All optimizer steps of one iteration: outcomes of the pieces, and metrics of each step.

        The first update's gradients accumulate while the scores of later pieces are still under way.
        """
        rollouts = [piece.rollout for piece in pieces]
        outcomes: list[Outcome] = []
        metrics = []

        def arriving() -> Iterator[Tensor]:
            for outcome in self._outcomes([piece.scored for piece in pieces]):
                outcomes.append(outcome)
                yield outcome.advantages

        with self.clock.phase("update"):
            updates = range(self.objective_settings.updates)
            own = updates if self.objective.prepares_each_update else updates[:1]
            prepared = [[self.prepare(rollout, update) for rollout in rollouts] for update in own]
            for update in updates:
                advantages = [outcome.advantages for outcome in outcomes] if update else arriving()
                # What is prepared once, before the first update, serves them all.
                metrics.append(self.update_once(rollouts, advantages, prepared[min(update, len(own) - 1)]))
            if self.old is not None:
                growth = self.objective_settings.old_decay_growth * (self.iteration + 1)
                self.old.blend(min(growth, self.objective_settings.old_decay))
        return outcomes, metrics

    # ----------------------------------------------------------------- logging and state

    def _log_iteration(self, iteration: Iteration, updates: list[dict[str, Tensor]]) -> None:
        size = sum(len(prompts) for prompts in iteration.prompts)
        iteration = iteration.over_ranks()
        self._silent.check(iteration)
        values = reward_metrics(self.rewards, iteration)
        values["advantage/abs_mean"] = iteration.advantages.abs().mean().item()
        means = update_means(updates)
        values |= {f"update/{key}": value for key, value in over_ranks(means).items()}
        values["update/skipped_in_a_row"] = float(self.skipped)
        self.log_dict(values, batch_size=size)
        self.log("reward", values["reward/mean"], prog_bar=True, logger=False, batch_size=size)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["grpo"] = {"iteration": self.iteration, "skipped": self.skipped}
        for name in ("old", "reference"):
            shadow = getattr(self, name)
            if shadow is not None:
                checkpoint["grpo"][name] = shadow.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["grpo"]
        self.iteration, self.skipped = state["iteration"], state["skipped"]
        for name in ("old", "reference"):
            if getattr(self, name) is not None and name in state:
                getattr(self, name).load_state_dict(state[name])
