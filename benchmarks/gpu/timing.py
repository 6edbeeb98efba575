"""Seconds of one call, by the device's own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.bench import Bench


def seconds(bench: Bench, function: Callable[[], object], *, repeats: int = 5, warm_up: int = 1) -> float:
    """Median seconds of a call.

    Args:
        bench: on a GPU, events on the current stream are read; on a CPU, the clock is.
        function: called again and again.
        repeats: at most; fewer where they would take longer than `bench.most_seconds`, and one in a tiny run.
        warm_up: calls before, which are not counted.
    """
    if bench.tiny:
        repeats = warm_up = 1
    for _ in range(warm_up):
        function()
    bench.synchronize()
    once = _events if bench.cuda else _clock
    found: list[float] = []
    while len(found) < repeats and (not found or sum(found) < bench.most_seconds):
        found.append(once(function))
    return statistics.median(found)


def _clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _events(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
