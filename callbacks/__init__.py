"""One callback a file."""

from callbacks.ema import WeightEMA
from callbacks.export import ExportModel
from callbacks.export_adapter import ExportAdapter
from callbacks.image_writer import ImageWriter
from callbacks.phase_timer import PhaseTimer
from callbacks.preemption import Preemption
from callbacks.progress import PhaseProgressBar
from callbacks.sample_grids import SampleGrids
from callbacks.scored_examples import ScoredExamples
from callbacks.tensorboard_layout import TensorBoardLayout

__all__ = [
    "ExportAdapter",
    "ExportModel",
    "ImageWriter",
    "PhaseProgressBar",
    "PhaseTimer",
    "Preemption",
    "SampleGrids",
    "ScoredExamples",
    "TensorBoardLayout",
    "WeightEMA",
]
