"""One callback a file."""

from callbacks.category_weights import CategoryWeightCalibration
from callbacks.ema import WeightEMA
from callbacks.export import ExportModel
from callbacks.image_writer import ImageWriter
from callbacks.phase_timer import PhaseTimer
from callbacks.progress import PhaseProgressBar
from callbacks.range_filter import RewardRangeFilter
from callbacks.sample_grids import SampleGrids
from callbacks.scored_examples import ScoredExamples
from callbacks.tensorboard_layout import TensorBoardLayout

__all__ = [
    "CategoryWeightCalibration",
    "ExportModel",
    "ImageWriter",
    "PhaseProgressBar",
    "PhaseTimer",
    "RewardRangeFilter",
    "SampleGrids",
    "ScoredExamples",
    "TensorBoardLayout",
    "WeightEMA",
]
