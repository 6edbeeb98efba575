"""TensorBoard's custom-scalars page and the run's hyper-parameters."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

LAYOUT = {
    "GRPO": {
        "reward": ["Multiline", ["^reward/mean$"]],
        "reward by category": ["Multiline", ["^category/.*"]],
        "range and deviation in a group": ["Multiline", ["^reward/range$", "^reward/std$"]],
        "ratio and clipping": ["Multiline", ["^update/.*ratio.*", "^update/.*clip.*"]],
        "gradient norm": ["Multiline", ["^update/gradient_norm$"]],
        "seconds by phase": ["Multiline", ["^time/.*_s$"]],
    },
    "distillation": {
        "gap to the teacher on the student's states": ["Multiline", ["^(t2i|edit)/gap$"]],
        "gap by noise level": ["Multiline", ["^(t2i|edit)/gap/sigma.*"]],
        "cosine with the teacher": ["Multiline", ["^(t2i|edit)/cosine$"]],
        "gap on fixed states": ["Multiline", ["^val/.*/gap$"]],
        "drift: what a task loses while others train": ["Multiline", ["^val/.*/drift$"]],
    },
    "validation": {"scores": ["Multiline", ["^val/.*/mean$"]]},
}


class TensorBoardLayout(Callback):
    """Writes the layout once a run, and at its end the hyper-parameters with the last validation's scores."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            trainer.logger.experiment.add_custom_scalars(LAYOUT)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        metrics = {f"hp/{k}": float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        trainer.logger.log_hyperparams(_flat(pl_module), metrics=metrics or None)


def _flat(module: Any) -> dict[str, Any]:
    """The module's settings as one level of plain values."""
    values: dict[str, Any] = {}
    for name in ("rollout_settings", "objective_settings", "distillation_settings", "lora"):
        record = getattr(module, name, None)
        if record is not None:
            values |= {f"{name.removesuffix('_settings')}/{k}": str(v) for k, v in vars(record).items()}
    for name in ("model_path", "image_size", "gradient_clip", "seed"):
        if hasattr(module, name):
            values[name] = getattr(module, name)
    return values
