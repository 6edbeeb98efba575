"""Measuring what training changed: intervals, ratings, image grids and the report."""

from evaluation.arena import Rating, Ratings, bradley_terry, expected_win_rate
from evaluation.battles import Battle, PairwiseJudge, RewardJudge, rate
from evaluation.bench import BenchTree, ScoreTable, bench
from evaluation.grids import before_after, image_grid, to_png
from evaluation.pipeline_picture import Box
from evaluation.report import Claim, Comparison, ComparisonRow, Curve, Report, read_tensorboard_curves, write_report
from evaluation.statistics import Interval, bootstrap_mean, paired_gain

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
    "RewardJudge",
    "ScoreTable",
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
