"""What all modules share: optimizer and schedule by config, and checkpoints of the trained weights alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from flow_rl.batches import PromptData
from flow_rl.distributed.gradients import finish_gradients, finite_everywhere, over_ranks, scale_gradients
from flow_rl.errors import RunStopped
from flow_rl.files import replace_file, writing
from flow_rl.models.adapters import LoraSettings
from flow_rl.models.workload import Workload
from flow_rl.planning.stage import Profile
from flow_rl.rl.phases import PhaseClock
from flow_rl.rl.shadow_weights import ShadowWeights
from lightning_modules.checkpoint_identity import (
    AVERAGE,
    KEY,
    averaged_weights,
    check_belongs,
    check_names,
    describe,
    digests_of,
)

#: stop a run after so many steps in a row with a loss or gradient that is not finite
MAX_SKIPPED = 5


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate, betas and the like of every group, as configured now."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_settings(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    """Put back what `settings_of` gave: a checkpoint brings its own, and what the user asks for now must win."""
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


class TrainedModule(LightningModule):
    """A module that is trained, by automatic or by manual optimization.

    Optimizer and learning-rate schedule come from the config. The schedule is stepped after every step of the
    optimizer. A step whose loss or gradient is not finite on any rank is left out on all of them, and `max_skipped` of
    them in a row end the run. A checkpoint holds the trained weights alone.

    A subclass sets what is declared here. Under automatic optimization it calls `note_loss` in its training step; under
    manual optimization it calls `finish_update`.
    """

    model_path: str
    #: height and width in pixels, of a module that trains a generator
    image_size: int | None = None
    #: the adapter that is trained; None trains whole weights
    lora: LoraSettings | None = None
    seed: int
    make_optimizer: OptimizerCallable
    #: None keeps the rate
    make_scheduler: LRSchedulerCallable | None
    #: largest gradient norm
    gradient_clip: float
    #: steps in a row that were left out before the run stops
    max_skipped = MAX_SKIPPED
    #: optimizer steps of one training step
    updates_per_step = 1
    #: what to look at where steps are not finite
    suspects = "the data"
    #: where time goes, for modules that count it
    clock: PhaseClock | None = None
    #: steps in a row that were left out
    skipped = 0
    #: the average of the trained weights, which is validated and exported; `callbacks.WeightEMA` sets it
    average: ShadowWeights | None = None
    #: the losses since the last optimizer step are finite on this rank
    _finite = True

    @property
    def compute_device(self) -> torch.device:
        """The device for inputs, latents and images.

        In a run it is the strategy's root device. `device`, or the device of a weight, is the wrong one to ask for:
        under FSDP2's CPU offload the weights rest on the CPU and compute on the GPU. Outside a run the module is where
        it was put.
        """
        trainer = self._trainer
        if trainer is not None and trainer.state.status == TrainerStatus.RUNNING:
            return trainer.strategy.root_device
        return self.device

    @property
    def base_path(self) -> str:
        """Where the weights come from that a checkpoint does not hold."""
        return self.model_path

    @cached_property
    def base_digests(self) -> dict[str, str]:
        """The content of the base by component, as of when it is first asked for."""
        return digests_of(self.base_path)

    @property
    def replaced_components(self) -> tuple[str, ...]:
        """Components of the base whose weights a checkpoint replaces, all of them."""
        return ()

    @property
    def weight_settings(self) -> dict[str, str]:
        """Settings, beside the adapter's, without which a checkpoint's weights are another model."""
        return {}

    def trained(self) -> list[nn.Parameter]:
        """The weights that the optimizer holds."""
        return [p for p in self.parameters() if p.requires_grad]

    def hyperparameters(self) -> dict[str, Any]:
        """Settings to compare runs by, as one level of plain values; a subclass adds its own."""
        names = ("model_path", "image_size", "gradient_clip", "seed")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        return values | ({} if self.lora is None else {f"lora/{k}": str(v) for k, v in vars(self.lora).items()})

    def profile(self) -> Profile:
        """The settings that the doctor checks; a subclass adds its own."""
        return Profile(
            manual=not self.automatic_optimization, make_optimizer=self.make_optimizer, updates=self.updates_per_step
        )

    def workload(self, data: PromptData | None, *, ranks: int) -> Workload | None:
        """What one iteration asks of the generator; None where that is not counted.

        Args:
            data: the prompts; None where the data are no prompts.
            ranks: processes that share them.
        """
        return None

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write JSON Lines into the folder of the logs, whole or not at all; nothing under `fast_dev_run`.

        Raises:
            CannotWrite: the disk refused.
        """
        if self.trainer.fast_dev_run:
            return
        path = Path(self.trainer.log_dir) / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    # ----------------------------------------------------------------- optimizer

    @override
    def setup(self, stage: str) -> None:
        """Refuse a schedule that does not fit the run, before a model loads."""
        if stage == "fit":
            _ = self.base_digests  # of what is loaded now: the folder may be another one's when a checkpoint is saved
            if self.make_scheduler is not None:
                check_schedule(self.make_optimizer, self.make_scheduler, self.trainer.max_steps)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.trained())
        self._settings = settings_of(optimizer)
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @override
    def on_train_start(self) -> None:
        if self.make_scheduler is None:  # a schedule resumes from its own state
            apply_settings(self.optimizers().optimizer, self._settings)

    # ----------------------------------------------------------------- steps

    def note_loss(self, loss: Tensor) -> None:
        """Remember whether this rank's loss is finite until the ranks vote, before the optimizer steps."""
        self._finite = self._finite and bool(torch.isfinite(loss.detach()).all())

    def log_means(self, values: dict[str, Tensor], *, batch_size: int) -> None:
        """Log scalars as their means over the ranks, in one message; `loss` is shown in the progress bar."""
        means = over_ranks({name: float(value) for name, value in values.items()})
        self.log("loss", means.pop("loss"), prog_bar=True, batch_size=batch_size)
        self.log_dict(means, batch_size=batch_size)

    @override
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Called by Lightning before an automatic step. A step that is left out finds no gradient."""
        norm = finish_gradients(self.trained(), self.gradient_clip)
        finite, self._finite = self._finite, True
        if finite_everywhere(norm, torch.tensor(0.0 if finite else float("nan"))):
            self.skipped = 0
        else:
            optimizer.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient
            self.skipped += 1
        self.log("skipped_in_a_row", float(self.skipped))
        self._stop_if_lost(f"step {self.global_step}")

    def finish_update(self, loss: Tensor, *, iteration: int, share: float = 1.0) -> Tensor:
        """Step by the gradients that have accumulated, under manual optimization.

        Where a loss or gradient of any rank is not finite, all of them skip the step, and count it. Where nothing was
        learnt from, they skip it as well: momentum and weight decay alone would move the weights.

        Args:
            loss: of the update.
            iteration: for the message.
            share: the part of all ranks' samples that the update learns from, the same on every rank. The accumulated
                gradients are means over all samples, to which the others contributed 0. They become means over this
                part.

        Returns:
            The gradient's norm before clipping; 0 where nothing was learnt from.

        Raises:
            RunStopped: too many updates in a row were skipped.
        """
        if not share:
            self._leave_out()
            return torch.zeros(())
        if share < 1:
            scale_gradients(self.trained(), 1 / share)
        optimizer, norm = self.optimizers(), finish_gradients(self.trained(), self.gradient_clip)
        if finite_everywhere(norm, loss):
            optimizer.step()
            if self.make_scheduler is not None:
                self.lr_schedulers().step()
            self.skipped = 0
            return norm
        self._leave_out()
        self.skipped += 1
        self._stop_if_lost(f"iteration {iteration}")
        return norm

    def _leave_out(self) -> None:
        """Skip a step. It still counts: whoever counts steps, such as ModelCheckpoint, finds whole iterations."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        optimizer._on_before_step()
        optimizer._on_after_step()

    def _stop_if_lost(self, when: str) -> None:
        if self.skipped >= self.max_skipped:
            raise RunStopped(
                f"Stopped at {when}: {self.skipped} updates in a row had a loss or gradient that is not finite. Lower "
                f"the learning rate, or look at {self.suspects} of the last iterations."
            )

    # ----------------------------------------------------------------- state

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the trained weights alone in the checkpoint: frozen ones come back from `model_path`."""
        kept = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["skipped"] = self.skipped
        checkpoint[KEY] = describe(self)
        if self.average is not None and "callbacks" not in checkpoint:  # ModelCheckpoint.save_weights_only
            checkpoint[AVERAGE] = self.average.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take a checkpoint's weights: to train on, those of its last step; to evaluate, those that are exported."""
        trainer = self._trainer
        fits = trainer is None or trainer.state.fn == TrainerFn.FITTING
        path = "the checkpoint" if trainer is None or trainer.ckpt_path is None else str(trainer.ckpt_path)
        check_belongs(self, checkpoint, path, fits=fits)
        self.strict_loading = False
        self.configure_model()
        if not fits and (average := averaged_weights(checkpoint)) is not None:
            rank_zero_info(f"Weights: the average (WeightEMA) in '{path}', which training validates and exports.")
            checkpoint["state_dict"] = dict(average)
        check_names(self, checkpoint["state_dict"])
        self.skipped = checkpoint["skipped"]


def check_optimizer(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None) -> None:
    """Try the optimizer on one number: a bad learning rate must not wait for the model to load.

    Raises:
        ValueError: what the optimizer or the scheduler refused, or a learning rate of 0.
    """
    try:
        made = optimizer([torch.nn.Parameter(torch.zeros(1))])
        if not all(group["lr"] > 0 for group in made.param_groups):
            raise ValueError("the learning rate is 0: nothing would be learnt. Set lr above 0.")
        if lr_scheduler is not None:
            lr_scheduler(made)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer or model.lr_scheduler: {error}") from None


def check_schedule(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable, steps: int) -> None:
    """Follow the learning rate to the end of the run.

    Args:
        optimizer: as configured.
        lr_scheduler: as configured, stepped after every update.
        steps: updates of the run; -1 for no end.

    Raises:
        ValueError: a schedule that fails before the run's end, or at whose end, long before, the rate is 0.
    """
    made = optimizer([torch.nn.Parameter(torch.zeros(1))])
    schedule = lr_scheduler(made)
    made.step()  # a schedule warns if it is stepped before its optimizer
    idle = 0
    for step in range(steps):
        idle = 0 if any(group["lr"] > 0 for group in made.param_groups) else idle + 1
        try:
            schedule.step()
        except (TypeError, ValueError) as error:  # a schedule that wants a metric is no schedule of updates
            raise ValueError(
                f"model.lr_scheduler: at update {step + 1} of trainer.max_steps = {steps}: {error}"
            ) from None
    if idle > max(1, steps // 20):  # a schedule may well end at 0 with the run, or an update before
        raise ValueError(
            f"model.lr_scheduler: the learning rate is 0 in the last {idle} of trainer.max_steps = {steps} updates, "
            "which would teach nothing. Let the schedule be as long as the run."
        )
