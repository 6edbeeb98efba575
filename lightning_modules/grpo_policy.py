"""GRPO on a flow-matching image model, with the rollouts inside the training step.

One step: G images a prompt are rolled out under guidance -> rewards -> advantages in the group -> one or several
updates whose objective sees the conditional branch alone (hybrid guidance, arXiv 2606.27608, section 3).

A step is made in chunks, groups that are rolled out together. A chunk's images go to the rewards as soon as they are
decoded, and the next chunk rolls out meanwhile. Then the first update takes chunk by chunk, waits for its scores and
accumulates its gradients while the later ones are still being scored. Weights change once all of them are in: nothing
is stale.

Shapes: P prompts, G images a prompt, N = P G samples, K rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import override

from flow_rl.batches import PromptData, Prompts, TaskBatches
from flow_rl.distributed.gradients import over_ranks
from flow_rl.distributed.sharding import gathered
from flow_rl.errors import check_above_zero
from flow_rl.models import load_image_model
from flow_rl.models.compilation import compile_blocks
from flow_rl.models.workload import Workload
from flow_rl.names import check_names
from flow_rl.planning.stage import Profile
from flow_rl.rewards import Reward
from flow_rl.rl.advantage_estimator import AdvantageEstimator, Outcome, share_that_teaches
from flow_rl.rl.iteration import Iteration
from flow_rl.rl.objectives import Metrics, Objective, Rollout
from flow_rl.rl.reward_metrics import combined, reward_metrics, update_means
from flow_rl.rl.reward_weights import FixedWeights, GroupFilter, WeightSource, weights_by_task
from flow_rl.rl.rollouts import roll_out
from flow_rl.rl.sampling import Sampler
from flow_rl.rl.score_queue import ScoreQueue
from flow_rl.rl.settings import AdvantageSettings, RolloutSettings
from flow_rl.rl.settings_checks import check_settings
from flow_rl.rl.shadow_weights import AdapterOff, ShadowWeights, reference_weights
from flow_rl.rl.silent_rewards import SilentIterations, SilentRewards
from flow_rl.rl.workload import policy_workload
from lightning_modules.image_module import ImageModule
from strategies import distribute, is_sharded_run


class GRPOPolicy(ImageModule):
    """Trains a generator's transformer to raise its rewards.

    Args:
        rewards: scorers by name, each on the scale 1..5.
        objective: what an update minimises.
        reward_weights: by reward name, non-negative, summing to 1; or such weights for each task (`t2i`, `edit`), where
            a reward that a task does not name is not asked about that task's samples. Equal if none are given.
        monitors: scorers that are watched in training, by name, and never part of the loss.
        rollout: how images are made.
        advantages: how several rewards become one advantage.
        max_silent: stop the run after so many iterations in a row in which no sample of any rank taught anything.
        **common: see `ImageModule`.

    Attributes:
        weight_source: says how much each reward weighs. A callback may replace it in `setup`.
        group_filters: say which groups are learnt from. A callback may add one in `setup`.
    """

    suspects = "the rewards"

    def __init__(
        self,
        *,
        rewards: dict[str, Reward],
        objective: Objective,
        reward_weights: dict[str, float | dict[str, float]] | None = None,
        monitors: dict[str, Reward] | None = None,
        rollout: RolloutSettings = RolloutSettings(),  # noqa: B008  (frozen)
        advantages: AdvantageSettings = AdvantageSettings(),  # noqa: B008
        max_silent: int = 20,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_above_zero("model", max_silent=max_silent)
        check_settings(rollout, objective, self.sigmas(rollout.num_steps).tolist(), self.lora, advantages)
        check_names("model.rewards", rewards)
        check_names("model.monitors", monitors or {})
        self.rewards = rewards
        self.reward_weights = weights_by_task(list(rewards), reward_weights)
        self.weight_source: WeightSource = FixedWeights(self.reward_weights)
        self.group_filters: list[GroupFilter] = []
        self.monitors = monitors or {}
        self.rollout_settings = rollout
        self.objective = objective
        self.updates_per_step = objective.updates
        self.advantage_settings = advantages
        self.old: ShadowWeights | None = None
        self.reference: ShadowWeights | AdapterOff | None = None
        self._silent = SilentRewards(self.max_skipped)
        self._taught_nothing = SilentIterations(max_silent)

    # ----------------------------------------------------------------- what it takes

    @override
    def profile(self) -> Profile:
        guidances = {"model.rollout.guidance.scale": self.rollout_settings.guidance}
        return replace(
            super().profile(),
            num_steps={"model.rollout.num_steps": self.rollout_settings.num_steps},
            guidances=guidances,
            drawn_guidances=guidances,
            rewards=self.rewards,
            monitors=self.monitors,
            trained_on={task: [n for n, w in row.items() if w > 0] for task, row in self.reward_weights.items()},
        )

    @override
    def workload(self, data: PromptData | None, *, ranks: int) -> Workload:
        return policy_workload(self.generator, self.rollout_settings, self.objective, data, ranks=ranks)

    # ----------------------------------------------------------------- set-up

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        size, dtypes = self.generator.size, self.generator.dtypes
        model = load_image_model(self.model_path, image_size=size, dtypes=dtypes, empty=is_sharded_run(self))
        sigmas = model.sigmas(self.rollout_settings.num_steps)
        self.limit_prompts(model)
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
        if self.objective.uses_old_policy:
            self.old = ShadowWeights(model.transformer)
        if self.objective.uses_reference:
            self.reference = reference_weights(model.transformer, adapter=self.lora is not None)

    # ----------------------------------------------------------------- one iteration

    @override
    def training_step(self, batch: Prompts | TaskBatches, batch_idx: int) -> dict[str, Iteration]:
        """One iteration; callbacks receive it as `outputs["iteration"]` of `on_train_batch_end`."""
        self.model.transformer.train()
        parts = batch.parts if isinstance(batch, TaskBatches) else (batch,)
        with ScoreQueue(self.rewards, self.asks, self.clock) as queue:
            for prompts in self._chunks(parts):
                queue.put(self.roll_out(prompts))
            with self.clock.phase("update"):
                prepared = self._prepare_updates(queue.rollouts)
                scored, metrics = self._update(self._estimator().estimate(queue), prepared[0], queue.samples)
                updates = [metrics] + [self._update(scored, again, queue.samples)[1] for again in prepared[1:]]
                if self.old is not None:
                    self.old.blend(self.objective.old_decay_at(self.iteration))
        iteration = Iteration.of(self.iteration, parts, scored, list(self.rewards))
        self._log_iteration(iteration, updates)
        self.iteration += 1
        return {"iteration": iteration}

    def _chunks(self, parts: Sequence[Prompts]) -> Iterator[Prompts]:
        """Prompts that are rolled out together; all of one task."""
        size = max(1, self.rollout_settings.batch_size // self.rollout_settings.group_size)
        for part in parts:
            yield from part.parts(size)

    def roll_out(self, prompts: Prompts) -> Rollout:
        """The images of every group, and what the updates need of how they came about."""
        settings, number = self.rollout_settings, self.iteration
        with self.clock.phase("rollout"):
            rollout = roll_out(
                self.model,
                self.sampler,
                prompts,
                settings,
                iteration=number,
                stochastic_steps=self.objective.stochastic_steps(settings, iteration=number, seed=self.seed),
                weights=self.old_weights,
            )
        self.clock.images += len(rollout)
        return rollout

    def old_weights(self) -> AbstractContextManager[None]:
        """Inside, the model computes with the old policy's weights, if there is one."""
        return nullcontext() if self.old is None else self.old.applied()

    # ----------------------------------------------------------------- scores

    @override
    def asks(self, name: str, task: str) -> bool:
        return name not in self.rewards or name in self.reward_weights.get(task, ())

    def _estimator(self) -> AdvantageEstimator:
        return AdvantageEstimator(
            self.advantage_settings,
            clip=self.objective.advantage_clip,
            reward_names=list(self.rewards),
            weight_source=self.weight_source,
            filters=self.group_filters,
        )

    def score(self, rollout: Rollout) -> Outcome:
        """Score one rollout at once."""
        with ScoreQueue(self.rewards, self.asks, self.clock) as queue:
            queue.put(rollout)
            [(_, outcome)] = self._estimator().estimate(queue)
        return outcome

    # ----------------------------------------------------------------- updates

    def prepare(self, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """What the old policy and the reference give for an update, from 0; see `Objective.prepare`."""
        with self.old_weights(), gathered(self.model.transformer):
            prepared = self.objective.prepare(self.model, rollout, update)
        if self.reference is not None:
            with self.reference.applied(), gathered(self.model.transformer):
                prepared |= self.objective.prepare_reference(self.model, rollout, prepared)
        return prepared

    def _prepare_updates(self, rollouts: Sequence[Rollout]) -> list[list[dict[str, Tensor]]]:
        """What every update of every rollout needs of the weights before the first update."""
        updates, own = self.objective.updates, self.objective.prepares_each_update
        prepared = [[self.prepare(r, update) for r in rollouts] for update in range(updates if own else 1)]
        return prepared if own else prepared * updates

    def _update(
        self, scored: Iterable[tuple[Rollout, Outcome]], prepared: Sequence[dict[str, Tensor]], samples: int
    ) -> tuple[list[tuple[Rollout, Outcome]], Metrics]:
        """One optimizer step over all rollouts, left out where it would not be finite.

        Rollouts are taken one after another, each when its turn comes: its scores may still be under way.

        Args:
            scored: rollouts with their advantages.
            prepared: see `Objective.prepare`, of each rollout.
            samples: in all rollouts.

        Returns:
            The rollouts with their advantages, and metrics of the update.
        """
        self.optimizers().zero_grad()
        taken, found = [], []
        steps = self.objective.pairs_per_sample(self.rollout_settings)
        with gathered(self.model.transformer):
            for (rollout, outcome), ready in zip(scored, prepared, strict=True):
                metrics = self.accumulate_gradients(
                    rollout, outcome.advantages, ready, teaches=outcome.teaches, pairs=samples * steps
                )
                taken.append((rollout, outcome))
                found.append((len(rollout) * steps, metrics))
        metrics, share = combined(found), share_that_teaches(outcome for _, outcome in taken)
        metrics["loss"] = metrics["loss"] / (share or 1.0)
        metrics["gradient_norm"] = self.finish_update(metrics["loss"], iteration=self.iteration, share=share)
        return taken, metrics

    def accumulate_gradients(
        self,
        rollout: Rollout,
        advantages: Tensor,
        prepared: Mapping[str, Tensor],
        *,
        teaches: Tensor | None = None,
        pairs: int | None = None,
    ) -> Metrics:
        """Backward micro-batch by micro-batch. Gradients are means over all pairs, of which silent ones contribute 0.

        Args:
            rollout: N samples.
            advantages: one a sample, shape (N,).
            prepared: see `Objective.prepare`.
            teaches: which samples are learnt from, bool (N,); None: all of them.
            pairs: (sample, step) pairs of the whole update, of which this rollout is a part; None: it is all of it.

        Returns:
            metrics of the rollout; its loss is its share of the update's.
        """
        collected: list[tuple[int, Metrics]] = []
        losses = self.objective.losses(self.model, rollout, advantages, prepared, teaches=teaches, pairs=pairs)
        for count, loss, metrics in losses:
            self.manual_backward(loss)
            collected.append((count, {"loss": loss.detach()} | metrics))
        return combined(collected)

    # ----------------------------------------------------------------- logging and state

    def _log_iteration(self, iteration: Iteration, updates: list[Metrics]) -> None:
        size = sum(len(prompts) for prompts in iteration.prompts)
        iteration = iteration.over_ranks()
        self._silent.check(iteration)
        self._taught_nothing.check(iteration, filters=self.group_filters, mode=self.advantage_settings.mode)
        values = reward_metrics(self.rewards, iteration)
        values["advantage/abs_mean"] = iteration.advantages.abs().mean().item()
        values["advantage/teaching"] = iteration.teaches.float().mean().item()
        means = update_means(updates)
        values |= {f"update/{key}": value for key, value in over_ranks(means).items()}
        values["update/skipped_in_a_row"] = float(self.skipped)
        self.log_dict(values, batch_size=size)
        self.log("reward", values["reward/mean"], prog_bar=True, logger=False, batch_size=size)

    @override
    def hyperparameters(self) -> dict[str, Any]:
        values = super().hyperparameters() | {"objective": type(self.objective).__name__}
        for group, settings in (("rollout", self.rollout_settings), ("objective", self.objective)):
            values |= {f"{group}/{name}": str(value) for name, value in vars(settings).items()}
        return values

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["grpo"] = {"iteration": self.iteration, "silent": self._taught_nothing.count}
        for name in ("old", "reference"):
            shadow = getattr(self, name)
            if shadow is not None:
                checkpoint["grpo"][name] = shadow.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["grpo"]
        self.iteration, self._taught_nothing.count = state["iteration"], state.get("silent", 0)
        for name in ("old", "reference"):
            if getattr(self, name) is not None and name in state:
                getattr(self, name).load_state_dict(state[name])
