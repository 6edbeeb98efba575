"""TensorBoard's custom-scalars page and the run's hyper-parameters."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.hacking_monitor import HackingMonitor
from callbacks.phase_timer import PhaseTimer
from callbacks.tensorboard import tensorboards, writers
from callbacks.update_probe import UpdateProbe
from lightning_modules import DistillationStudent, GRPOPolicy
from lightning_modules.base import TrainedModule

Section = dict[str, list[str | list[str]]]


def _lines(*tags: str) -> list[str | list[str]]:
    """One chart of all scalars whose tags match."""
    return ["Multiline", list(tags)]


_GRPO: Section = {
    "reward": _lines("^reward/mean$"),
    "reward by category": _lines("^category/.*"),
    "range and deviation in a group": _lines("^reward/range$", "^reward/std$"),
    "share of the images that teach": _lines("^advantage/teaching$"),
    "gradient norm": _lines("^update/gradient_norm$"),
}
_TIME: Section = {
    "seconds by phase": _lines("^time/(?!images_per_).*_s$"),
    "images a second": _lines("^time/images_per_s$"),
    "TFLOP/s by phase": _lines("^time/.*tflops$"),
}
_REFERENCE: Section = {"distance to the weights before training": _lines("^update/kl$")}
_PROBE: Section = {
    "reward at the update and a step along it": _lines("^probe/before$", "^probe/after$"),
    "slope along the update": _lines("^probe/slope$"),
}
_MONITOR: Section = {
    "training reward, and scorers never trained on": _lines("^monitor/proxy$", "^monitor/panel$"),
    "alerts": _lines("^monitor/alert$"),
    "pictures": _lines("^monitor/(brightness|saturation|contrast|sharpness|diversity)$"),
    "unconditional branch": _lines("^monitor/unconditional_drift$"),
}
_DISTILLATION: Section = {
    "gap to the teacher on the student's states": _lines("^(t2i|edit)/gap$"),
    "gap by noise level": _lines("^(t2i|edit)/gap/sigma.*"),
    "cosine with the teacher": _lines("^(t2i|edit)/cosine$"),
    "gap on fixed states": _lines("^val/.*/gap$"),
    "drift: what a task loses while others train": _lines("^val/.*/drift$"),
}
_VALIDATION: Section = {"scores": _lines("^val/.*/mean$")}


def layout_of(trainer: Trainer, module: LightningModule) -> dict[str, Section]:
    """The charts that this run has curves for, by section. The module is set up."""

    def has(kind: type[Callback]) -> bool:
        return any(isinstance(callback, kind) for callback in trainer.callbacks)

    layout = {}
    if isinstance(module, GRPOPolicy):
        layout["GRPO"] = (
            _GRPO
            | {title: _lines(*tags) for title, tags in module.objective.charts.items()}
            | (_REFERENCE if module.objective.uses_reference else {})
            | (_PROBE if has(UpdateProbe) else {})
            | (_TIME if has(PhaseTimer) else {})
        )
    if isinstance(module, DistillationStudent):
        layout["distillation"] = _DISTILLATION
    if has(HackingMonitor):
        layout["monitor"] = _MONITOR
    return layout | {"validation": _VALIDATION}


class TensorBoardLayout(Callback):
    """Writes the layout once a run, and at its end the hyper-parameters with the last validation's scores."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for writer in writers(trainer):
            writer.add_custom_scalars(layout_of(trainer, pl_module))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {f"hp/{k}": float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        hyperparameters = pl_module.hyperparameters() if isinstance(pl_module, TrainedModule) else {}
        for logger in tensorboards(trainer):
            logger.log_hyperparams(hyperparameters, metrics=metrics or None)
