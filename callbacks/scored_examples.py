"""A page of scored examples and the calibration curves, at every validation of a reward model."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from callbacks.tensorboard import tensorboards, writers
from flow_rl.evaluation.agreement import Reliability, reliability
from flow_rl.evaluation.grids import image_grid
from lightning_modules.reward_finetune import ScoredBatch

if TYPE_CHECKING:  # every run imports the callbacks, and few draw a figure
    from matplotlib.figure import Figure

Row = tuple[Tensor, str]


class ScoredExamples(Callback):
    """Puts images, and a table of prompt, reasoning, score and truth beside them, into TensorBoard.

    It shows what the validation scored anyway, so it costs no forward of its own.

    Args:
        per_dimension: images of each dimension, the first ones of the validation data.
    """

    def __init__(self, per_dimension: int = 8) -> None:
        if per_dimension < 1:
            raise ValueError(f"ScoredExamples per_dimension is {per_dimension}; it must be at least 1.")
        self.per_dimension = per_dimension
        self._rows: dict[str, list[Row]] = {}

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = {}

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: ScoredBatch, *args: Any, **kwargs: Any
    ) -> None:
        answers = outputs.answers
        for i, example in enumerate(outputs.examples):
            kept = self._rows.setdefault(example.annotation.dimension, [])
            if len(kept) < self.per_dimension:
                cells = (
                    str(len(kept) + 1),
                    example.annotation.prompt,
                    answers.reasoning[i],
                    "unreadable" if answers.scores[i].isnan() else f"{float(answers.scores[i]):.2f}",
                    f"{example.annotation.score:g}",
                )
                kept.append((_side_by_side(example.source, example.image), " | ".join(map(_cell, cells))))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not tensorboards(trainer) or trainer.sanity_checking:
            return
        for dimension, metric in pl_module.agreement.items():
            with metric.sync_context():  # every rank takes part in the gathering, one draws
                predictions, truths, _ = metric.scored()
            if not len(predictions):
                continue
            for writer in writers(trainer):
                curve = reliability(predictions.cpu(), truths.cpu(), bins=metric.bins)
                writer.add_figure(f"reliability/{dimension}", _figure(dimension, curve), trainer.global_step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for writer, (dimension, rows) in product(writers(trainer), sorted(self._rows.items())):
            same = [image for image, _ in rows if image.shape == rows[0][0].shape]
            grid = image_grid(torch.stack(same), columns=min(4, len(same)))
            writer.add_image(f"scored/{dimension}", grid, trainer.global_step)
            table = "\n".join(f"| {line} |" for _, line in rows)
            header = "| # | prompt | reasoning | score | truth |\n|---|---|---|---|---|\n"
            writer.add_text(f"scored/{dimension}", header + table, trainer.global_step)


def _side_by_side(source: Tensor | None, image: Tensor) -> Tensor:
    """The image in [0, 1], an edit's source to its left where they have one height."""
    parts = [image] if source is None or source.shape[1] != image.shape[1] else [source, image]
    return torch.cat(parts, dim=2).float() / 255


def _cell(text: str) -> str:
    """The text on one line of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " / ")


def _figure(dimension: str, curve: Reliability) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    filled = curve.counts > 0
    axes.plot([1, 5], [1, 5], color="0.7", linewidth=1)
    axes.plot(curve.predicted[filled], curve.truth[filled], marker="o")
    for x, y, n in zip(curve.predicted[filled], curve.truth[filled], curve.counts[filled], strict=True):
        axes.annotate(str(int(n)), (float(x), float(y)), textcoords="offset points", xytext=(4, -10), fontsize=7)
    axes.set(xlim=(0.9, 5.1), ylim=(0.9, 5.1), xlabel="mean score of the model", ylabel="mean human score")
    axes.set_title(f"{dimension}: calibration error {float(curve.error):.2f}", fontsize=9)
    return figure
