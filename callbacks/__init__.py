"""One callback a file."""

from callbacks.category_weights import CategoryWeightCalibration
from callbacks.ema import WeightEMA
from callbacks.export import ExportAdapter, ExportModel
from callbacks.hacking_monitor import HackingMonitor
from callbacks.image_writer import ImageWriter
from callbacks.phase_timer import PhaseTimer
from callbacks.preemption import Preemption
from callbacks.progress import PhaseProgressBar
from callbacks.range_filter import RewardRangeFilter
from callbacks.run_checkpoint import RunCheckpoint
from callbacks.sample_grids import SampleGrids
from callbacks.scored_examples import ScoredExamples
from callbacks.tensorboard_layout import TensorBoardLayout
from callbacks.update_probe import UpdateProbe

__all__ = [
    "CategoryWeightCalibration",
    "ExportAdapter",
    "ExportModel",
    "HackingMonitor",
    "ImageWriter",
    "PhaseProgressBar",
    "PhaseTimer",
    "Preemption",
    "RewardRangeFilter",
    "RunCheckpoint",
    "SampleGrids",
    "ScoredExamples",
    "TensorBoardLayout",
    "UpdateProbe",
    "WeightEMA",
]
