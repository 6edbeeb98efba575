"""What all modules share: optimizer and schedule by config, and checkpoints of the trained weights alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from flow_rl.batches import PromptData
from flow_rl.distributed.gradients import finish_gradients, finite_everywhere, over_ranks
from flow_rl.errors import RunStopped
from flow_rl.models import ImageModel
from flow_rl.models.adapters import LoraSettings, add_lora
from flow_rl.models.memory import FrozenDtype
from flow_rl.models.workload import Workload
from flow_rl.planning.stage import Generator, Profile


class ComputingModule(LightningModule):
    """Knows the device on which its model computes, and says what it takes before it has weights."""

    def profile(self) -> Profile:
        """The settings that the doctor checks; a subclass adds its own."""
        return Profile(manual=not self.automatic_optimization)

    def workload(self, data: PromptData | None, *, ranks: int) -> Workload | None:
        """What one iteration asks of the generator; None where that is not counted.

        Args:
            data: the prompts; None where the data are no prompts.
            ranks: processes that share them.
        """
        return None

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


#: stop a run after so many steps in a row with a loss or gradient that is not finite
MAX_SKIPPED = 5


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate, betas and the like of every group, as configured now."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_settings(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    """Put back what `settings_of` gave: a checkpoint brings its own, and what the user asks for now must win."""
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


class ConfiguredOptimizer(ComputingModule):
    """Optimizer and learning-rate schedule by config; the schedule is stepped after every step of the optimizer.

    A subclass sets `make_optimizer` and `make_scheduler` (None keeps the rate), and says what is trained.
    """

    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None

    @override
    def profile(self) -> Profile:
        return replace(super().profile(), make_optimizer=self.make_optimizer)

    def trained(self) -> list[nn.Parameter]:
        """The weights that the optimizer holds."""
        return [p for p in self.parameters() if p.requires_grad]

    @override
    def setup(self, stage: str) -> None:
        """Refuse a schedule that does not fit the run, before a model loads."""
        if stage == "fit" and self.make_scheduler is not None:
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
        if self.make_scheduler is None:  # a schedule goes on with what it has in its own state
            apply_settings(self.optimizers().optimizer, self._settings)


class ScheduledOptimizer(ConfiguredOptimizer):
    """Trains every parameter that wants a gradient, by automatic optimization.

    A step whose loss or gradient is not finite on any rank is left out on all of them; `MAX_SKIPPED` in a row end the
    run. A subclass sets `gradient_clip`, the largest norm, and calls `note_loss` in its training step.
    """

    gradient_clip: float
    #: steps in a row that were left out
    skipped = 0
    #: the losses since the last optimizer step are finite on this rank
    _finite = True

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
        norm = finish_gradients(self.trained(), self.gradient_clip)
        finite, self._finite = self._finite, True
        if finite_everywhere(norm, torch.tensor(0.0 if finite else float("nan"))):
            self.skipped = 0
        else:
            optimizer.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient
            self.skipped += 1
        self.log("skipped_in_a_row", float(self.skipped))
        if self.skipped >= MAX_SKIPPED:
            raise RuntimeError(
                f"Stopped at step {self.global_step}: {self.skipped} steps in a row had a loss or gradient that is not "
                "finite. Lower the learning rate, or compute in float32."
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = self.skipped

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
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


def check_positive(**values: float) -> None:
    """Refuse settings of the model, by name, that are not above 0.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"model.{name} is {value}; it must be above 0.")


def keep_trained(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Leave the trained weights alone in a checkpoint: frozen ones come back from `model_path`."""
    kept = {name for name, p in module.named_parameters() if p.requires_grad}
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}


def expect_trained(module: LightningModule) -> None:
    """Make ready for a checkpoint that `keep_trained` left."""
    module.strict_loading = False
    module.configure_model()


class TransformerTraining(ConfiguredOptimizer):
    """Trains a generator's transformer, all of it or an adapter, by manual optimization.

    A subclass sets everything below.
    """

    model: ImageModel | None
    model_path: str
    image_size: int
    lora: LoraSettings | None
    frozen_dtype: FrozenDtype
    gradient_checkpointing: bool
    gradient_clip: float
    seed: int
    iteration: int
    #: updates in a row that were not finite
    skipped: int
    #: what to look at where updates are not finite
    suspects: str

    @override
    def profile(self) -> Profile:
        generator = Generator(
            model_path=self.model_path,
            image_size=self.image_size,
            lora=self.lora,
            frozen_dtype=self.frozen_dtype,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return replace(super().profile(), generator=generator)

    def choose_trained(self, model: ImageModel) -> None:
        """Say which of the transformer's weights are trained, and add the adapter if that is what is."""
        if self.lora is None:
            model.transformer.requires_grad_(True)
            return
        with torch.random.fork_rng(devices=[]):
            # The same adapter on every rank and after every restart. Only the CPU's generator matters (`add_lora`).
            torch.default_generator.manual_seed(self.seed)
            add_lora(model.transformer, **vars(self.lora), targets=model.lora_targets)

    @override
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.transformer.parameters() if p.requires_grad]

    def finish_update(self, loss: Tensor, *, max_skipped: int) -> Tensor:
        """Step by the gradients that have accumulated.

        Where a loss or gradient of any rank is not finite, all of them skip the step, and count it.

        Args:
            loss: of the update.
            max_skipped: stop the run after so many skipped updates in a row.

        Returns:
            The gradient's norm before clipping.
        """
        optimizer, norm = self.optimizers(), finish_gradients(self.trained(), self.gradient_clip)
        if finite_everywhere(norm, loss):
            optimizer.step()
            if self.make_scheduler is not None:
                self.lr_schedulers().step()
            self.skipped = 0
            return norm
        optimizer.zero_grad()
        # It counts as a step nevertheless: whoever counts them, such as ModelCheckpoint, finds whole iterations.
        optimizer._on_before_step()
        optimizer._on_after_step()
        self.skipped += 1
        if self.skipped >= max_skipped:
            raise RunStopped(
                f"Stopped at iteration {self.iteration}: {self.skipped} updates in a row had a loss or gradient that "
                f"is not finite. Lower the learning rate, or look at {self.suspects} of the last iterations."
            )
        return norm

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(checkpoint, self)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expect_trained(self)

    def export(self, path: str | Path) -> None:
        """Write the trained generator in the diffusers layout; a student is sampled at guidance 1."""
        self.model.save_pretrained(path)
