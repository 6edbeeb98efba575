"""One callback a file, imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flow_rl.lazy_names import on_demand

if TYPE_CHECKING:
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
__getattr__, __dir__ = on_demand(
    __name__,
    {
        "CategoryWeightCalibration": "category_weights",
        "ExportAdapter": "export",
        "ExportModel": "export",
        "HackingMonitor": "hacking_monitor",
        "ImageWriter": "image_writer",
        "PhaseProgressBar": "progress",
        "PhaseTimer": "phase_timer",
        "Preemption": "preemption",
        "RewardRangeFilter": "range_filter",
        "RunCheckpoint": "run_checkpoint",
        "SampleGrids": "sample_grids",
        "ScoredExamples": "scored_examples",
        "TensorBoardLayout": "tensorboard_layout",
        "UpdateProbe": "update_probe",
        "WeightEMA": "ema",
    },
)
