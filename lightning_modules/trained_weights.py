"""What modules share about the weights they train: which they are, checkpoints of them alone, updates by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.optimizers import ConfiguredOptimizer
from lightning_modules.settings import LoraSettings
from lightning_modules.stopping import RunStopped
from models import ImageModel
from models.adapters import add_lora
from strategies.gradients import finish_gradients, finite_everywhere


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
    lora: LoraSettings | None
    gradient_clip: float
    seed: int
    iteration: int
    #: updates in a row that were not finite
    skipped: int
    #: what to look at where updates are not finite
    suspects: str

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
