"""Two ways to do one thing, timed in turns, so that whatever else the machine does falls on both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster `new` is than `old`.

    Attributes:
        old: median seconds of the old way.
        new: median seconds of the new way.
        ratio: median over rounds of old / new.
        low: lower end of the ratio's 95 % interval, rounds resampled.
        high: upper end.
        rounds: how often each was timed.
    """

    old: float
    new: float
    ratio: float
    low: float
    high: float
    rounds: int

    def row(self, name: str) -> str:
        """A Markdown table row: name, old, new, ratio with its interval."""
        return (
            f"| {name} | {self.old:.3f} s | {self.new:.3f} s | {self.ratio:.2f} "
            f"({self.low:.2f} to {self.high:.2f}) | {self.rounds} |"
        )


HEADER = "| what | old | new | old / new (95 %) | rounds |\n|---|---|---|---|---|"


def compare(old: Callable[[], object], new: Callable[[], object], *, rounds: int = 11) -> Ratio:
    """Time both in turns after one warm-up each; the order alternates from round to round."""
    seconds: dict[str, list[float]] = {"old": [], "new": []}
    ways = [("old", old), ("new", new)]
    for _, way in ways:
        way()
    for number in range(rounds):
        for name, way in ways if number % 2 == 0 else reversed(ways):
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    ratios = np.array(seconds["old"]) / np.array(seconds["new"])
    draws = np.random.default_rng(0).integers(rounds, size=(2000, rounds))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(
        old=statistics.median(seconds["old"]),
        new=statistics.median(seconds["new"]),
        ratio=float(np.median(ratios)),
        low=float(low),
        high=float(high),
        rounds=rounds,
    )
