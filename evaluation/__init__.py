"""Measuring what training changed: intervals, ratings, image grids and the report."""

from evaluation.arena import Rating, Ratings, bradley_terry, expected_win_rate
from evaluation.grids import before_after, image_grid, to_png
from evaluation.report import Comparison, ComparisonRow, Curve, Report, read_tensorboard_curves, write_report
from evaluation.statistics import Interval, bootstrap_mean, paired_gain

__all__ = [
    "Comparison",
    "ComparisonRow",
    "Curve",
    "Interval",
    "Rating",
    "Ratings",
    "Report",
    "before_after",
    "bootstrap_mean",
    "bradley_terry",
    "expected_win_rate",
    "image_grid",
    "paired_gain",
    "read_tensorboard_curves",
    "to_png",
    "write_report",
]
