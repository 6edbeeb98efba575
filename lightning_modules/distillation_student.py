"""On-policy distillation: many teachers, one student, the student's own trajectories.

One step: the student rolls out by ODE without guidance -> the teacher of the batch's task gives its guided velocity
at the states on the way -> the student's velocity is pulled to it, state by state, in one optimizer step (arXiv
2606.27608, on-policy distillation). States are constants: nothing flows back through the solver. The student learns
the guidance with the rest, and is sampled at guidance 1.

Shapes: M (sample, state) pairs of a micro-batch, S latent tokens, C latent channels.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from flow_rl.batches import PromptData, Prompts
from flow_rl.distillation.settings import (
    BASE,
    DistillationSettings,
    TeacherSettings,
    check_scored,
    check_teachers,
    student_path,
    warn_of_teachers,
)
from flow_rl.distillation.student_states import States, measure_gap, student_states
from flow_rl.distillation.teachers import TeacherBank
from flow_rl.distillation.velocity_gap import VelocityGap
from flow_rl.distillation.workload import student_workload
from flow_rl.distributed.gradients import over_ranks
from flow_rl.distributed.sharding import gathered
from flow_rl.errors import check_above_zero
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.noise import Stream, keyed_generator
from flow_rl.flow.objectives import velocity_matching_loss
from flow_rl.models import load_image_model
from flow_rl.models.compilation import compile_blocks
from flow_rl.models.memory import FROZEN_DTYPES
from flow_rl.models.workload import Workload
from flow_rl.names import check_names
from flow_rl.planning.stage import Profile
from flow_rl.rewards import Reward
from flow_rl.rl.sampling import Sampler
from lightning_modules.image_module import Drawn, ImageModule
from strategies import distribute, is_sharded_run


class DistillationStudent(ImageModule):
    """Trains one generator to follow a teacher on each task.

    Args:
        teachers: by task (`t2i`, `edit`); a batch is routed by its own task.
        distillation: how the student learns.
        initial: where the student starts: `base`, or the task whose teacher it starts as.
        shard_teachers: spread the teachers over the ranks where the run's strategy spreads the student; else every rank
            holds them whole. Nothing happens under other strategies.
        rewards: scorers by name, for validation and `test`; none of them is trained on.
        scored: by task, the names of the rewards that are asked about its samples; None asks all of them.
        guidance: of `test` and `predict`. The student is made for 1; above, its guidance and its teacher's compose.
        val_guidances: validation draws at each of these; None is 1 alone.
        **common: see `ImageModule`.
    """

    suspects = "the teachers' velocities (gap/...)"

    def __init__(
        self,
        *,
        teachers: dict[str, TeacherSettings],
        distillation: DistillationSettings = DistillationSettings(),  # noqa: B008  (frozen)
        initial: str = BASE,
        shard_teachers: bool = True,
        rewards: dict[str, Reward] | None = None,
        scored: dict[str, list[str]] | None = None,
        guidance: float = 1.0,
        val_guidances: list[float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        distillation.weights(self.sigmas(distillation.num_steps))
        self.val_guidances = val_guidances or [1.0]
        for scale in self.val_guidances:
            check_above_zero("model", guidance=guidance, val_guidances=scale)
        self.start_path = student_path(self.model_path, initial, teachers)
        self.teachers = teachers
        self.distillation_settings = distillation
        self.shard_teachers = shard_teachers
        check_names("model.rewards", rewards or {})
        self.rewards = rewards or {}
        self.scored = check_scored(scored, list(self.rewards))
        self.guidance = guidance
        self.gap = VelocityGap()
        self.lowest_gaps: dict[str, float] = {}
        self.bank: TeacherBank | None = None

    # ----------------------------------------------------------------- what it takes

    @property
    @override
    def base_path(self) -> str:
        return self.start_path

    @override
    def profile(self) -> Profile:
        return replace(
            super().profile(),
            num_steps={"model.distillation.num_steps": self.distillation_settings.num_steps},
            guidances={f"model.teachers.{t}.guidance.scale": teacher.guidance for t, teacher in self.teachers.items()},
            # A student is drawn without its teachers, and is made for 1.
            drawn_guidances={} if self.guidance == 1 else {"model.guidance": Guidance(scale=self.guidance)},
            teachers=self.teachers,
            rewards=self.rewards,
        )

    @override
    def workload(self, data: PromptData | None, *, ranks: int) -> Workload:
        return student_workload(
            self.generator,
            self.distillation_settings,
            self.teachers,
            data,
            start_path=self.start_path,
            shard_teachers=self.shard_teachers,
            val_guidances=self.val_guidances,
            ranks=ranks,
        )

    # ----------------------------------------------------------------- set-up

    @override
    def setup(self, stage: str) -> None:
        """Refuse teachers and data that do not fit, before a model loads."""
        super().setup(stage)
        if stage not in ("fit", "validate"):
            return  # a student is tested and sampled without its teachers
        check_teachers(
            self.teachers,
            model_path=self.model_path,
            start_path=self.start_path,
            num_steps=self.distillation_settings.num_steps,
            image_size=(self.image_size, self.image_size),
        )
        warn_of_teachers(self.teachers, self.model_path, getattr(self.trainer.datamodule, "task_names", None))

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        size, dtypes = self.generator.size, self.generator.dtypes
        spread = is_sharded_run(self)
        model = load_image_model(self._weights_path(), image_size=size, dtypes=dtypes, empty=spread)
        self.limit_prompts(model)
        self.choose_trained(model)
        if self.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        self.model = model
        self.sampler = Sampler(
            sigmas=model.sigmas(self.distillation_settings.num_steps),
            guidance=Guidance(scale=self.guidance),
            size=size,
            seed=self.seed,
            batch_size=self.distillation_settings.batch_size,
        )
        if self._trainer is None or self.trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING):
            self.bank = TeacherBank(
                model,
                self.teachers,
                model_path=self.model_path,
                shared_path=None if self.lora is None else self.start_path,
                dtype=FROZEN_DTYPES[self.frozen_dtype],
                spread=partial(distribute, self) if spread and self.shard_teachers else None,
            )
        # Adapters of teachers that the student's own transformer plays are there by now.
        if self.compile_blocks:
            compile_blocks(model)
        model.uniform_forwards = distribute(self, model, model.shard_units(), model.stored)

    def _weights_path(self) -> str:
        """Where training starts; `model_path` itself where an export is evaluated, and no checkpoint is loaded."""
        trains = self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        return self.start_path if trains or self.trainer.ckpt_path else self.model_path

    @override
    def asks(self, name: str, task: str) -> bool:
        return self.scored is None or name not in self.rewards or name in self.scored.get(task, ())

    # ----------------------------------------------------------------- one iteration

    @override
    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        self.bank.guidance(batch.task)  # a task without a teacher ends here
        self.bank.prefetch(batch.task)
        states = self.roll_out(batch)
        with ExitStack() as whole:
            if not self.bank.has_own_transformer(batch.task):
                whole.enter_context(gathered(self.model.transformer))
            with self.clock.phase("teacher"), self.bank.gathered(batch.task):
                targets = self.targets(batch.task, states)
        self.bank.prefetch(self._next_task())  # this teacher is done: the next comes in while the student learns
        with self.clock.phase("update"):
            metrics = self._update(states, targets)
        self._log_iteration(batch, metrics)
        self.iteration += 1

    def _next_task(self) -> str | None:
        data = self.trainer.datamodule
        return data.task_at(self.iteration + 1) if isinstance(data, PromptData) else None

    def roll_out(self, batch: Prompts) -> States:
        """The student's own states of this iteration, without guidance."""
        settings, sigmas = self.distillation_settings, self.sampler.sigmas
        self.model.transformer.eval()
        generator = keyed_generator(seed=self.seed, step=self.iteration, stream=Stream.STATE)
        self.clock.images += len(batch)
        with self.clock.phase("rollout"), torch.no_grad():
            guided = replace(self.sampler, guidance=self.bank.guidance(batch.task))
            branches = guided.encode(self.model, batch.texts, batch.sources)
            with gathered(self.model.transformer):
                return student_states(
                    self.model,
                    self.sampler,
                    batch,
                    steps=settings.states(sigmas, generator),
                    weights=settings.weights(sigmas),
                    iteration=self.iteration,
                    batch_size=settings.batch_size,
                    branches=branches,
                )

    def targets(self, task: str, states: States) -> list[Tensor]:
        """The teacher's guided velocities (M, S, C) of every micro-batch."""
        return [
            self.bank.velocity(
                task,
                states.latents[pairs.step, pairs.sample],
                states.sigmas[pairs.step],
                states.conditional.select(pairs.samples),
                None if states.unconditional is None else states.unconditional.select(pairs.samples),
                levels=[states.levels[step] for step in pairs.steps],
            )
            for pairs in states.micro_batches(self.distillation_settings.micro_batch_size)
        ]

    def accumulate_gradients(self, states: States, targets: list[Tensor]) -> dict[str, float]:
        """Backward micro-batch by micro-batch; returns the loss and the gaps of the whole batch."""
        self.model.transformer.train()
        self.gap.reset()
        pairs_in_all = len(states.conditional) * len(states.levels)
        total = torch.zeros((), device=states.latents.device)
        batches = states.micro_batches(self.distillation_settings.micro_batch_size)
        for pairs, target in zip(batches, targets, strict=True):
            sigma = states.sigmas[pairs.step]
            velocity = self.model.velocity(
                states.latents[pairs.step, pairs.sample], sigma, states.conditional.select(pairs.samples)
            )
            loss, _ = velocity_matching_loss(
                velocity, target, weights=states.weights[pairs.step], denominator=pairs_in_all
            )
            self.manual_backward(loss)
            total += loss.detach()
            self.gap.update(velocity, target, sigma)
        return {"loss": float(total)} | self.gap.compute()

    def _update(self, states: States, targets: list[Tensor]) -> dict[str, float]:
        """One optimizer step, skipped (and counted) where the gradient is not finite."""
        self.optimizers().zero_grad()
        with gathered(self.model.transformer):
            metrics = self.accumulate_gradients(states, targets)
        norm = self.finish_update(torch.tensor(metrics["loss"]), iteration=self.iteration)
        return metrics | {"gradient_norm": float(norm)}

    def _log_iteration(self, batch: Prompts, metrics: dict[str, float]) -> None:
        metrics = over_ranks(metrics)
        values = {"update/gradient_norm": metrics.pop("gradient_norm"), "update/skipped_in_a_row": float(self.skipped)}
        values["loss"] = metrics.pop("loss")
        values |= {f"{batch.task}/{name}": value for name, value in metrics.items()}
        values[f"{batch.task}/loss"] = values["loss"]
        self.log_dict(values, batch_size=len(batch))
        self.log("gap", metrics["gap"], prog_bar=True, logger=False, batch_size=len(batch))

    # ----------------------------------------------------------------- validation

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._gaps: dict[str, VelocityGap] = {}

    @override
    def validation_step(self, batch: Prompts, batch_idx: int) -> dict[str, Drawn]:
        drawn: dict[str, Drawn] = {}
        for scale in self.val_guidances:
            label = "" if scale == 1 else f"guidance_{scale:g}/"
            sampler = replace(self.sampler, guidance=Guidance(scale=scale))
            drawn[label] = self.draw(batch, self.rewards, self.val_members, sampler=sampler)
            scores = {f"{label}{name}": values for name, values in drawn[label].scores.items()}
            self._collect(replace(drawn[label], scores=scores))
        if batch.task in self.teachers:
            gap = self._gaps.setdefault(batch.task, VelocityGap().to(self.compute_device))
            measure_gap(self.model, self.sampler, self.bank, batch, gap, self.compute_device)
        return drawn

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        for task, gap in self._gaps.items():
            found = gap.compute()
            lowest = min(found["gap"], self.lowest_gaps.get(task, found["gap"]))
            # What one task loses while the others train: 0 as long as its gap shrinks.
            found["drift"] = found["gap"] - lowest
            self.log_dict({f"val/{task}/{name}": value for name, value in found.items()})
            if not self.trainer.sanity_checking:
                self.lowest_gaps[task] = lowest

    @override
    def hyperparameters(self) -> dict[str, Any]:
        settings = vars(self.distillation_settings)
        return super().hyperparameters() | {f"distillation/{name}": str(value) for name, value in settings.items()}

    # ----------------------------------------------------------------- state

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["distillation"] = {"iteration": self.iteration, "lowest_gaps": dict(self.lowest_gaps)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["distillation"]
        self.iteration = state["iteration"]
        self.lowest_gaps = dict(state["lowest_gaps"])
