"""Measuring what training changed: intervals, ratings, image grids and the report."""

from flow_rl.evaluation.arena import Rating, Ratings, bradley_terry, expected_win_rate
from flow_rl.evaluation.battles import Battle, PairwiseJudge, RewardJudge, rate
from flow_rl.evaluation.bench import BenchTree, ScoreTable, bench
from flow_rl.evaluation.curves import Curve, read_tensorboard_curves
from flow_rl.evaluation.grids import before_after, image_grid, to_png
from flow_rl.evaluation.pipeline_picture import Box
from flow_rl.evaluation.records import Claim, Comparison, ComparisonRow, Report, RewardAgreement, Watch
from flow_rl.evaluation.report import write_report
from flow_rl.evaluation.statistics import Interval, bootstrap_mean, paired_gain

__all__ = [
    "Battle",
    "BenchTree",
    "Box",
    "Claim",
    "Comparison",
    "ComparisonRow",
    "Curve",
    "Interval",
    "PairwiseJudge",
    "Rating",
    "Ratings",
    "Report",
    "RewardAgreement",
    "RewardJudge",
    "ScoreTable",
    "Watch",
    "before_after",
    "bench",
    "bootstrap_mean",
    "bradley_terry",
    "expected_win_rate",
    "image_grid",
    "paired_gain",
    "rate",
    "read_tensorboard_curves",
    "to_png",
    "write_report",
]
