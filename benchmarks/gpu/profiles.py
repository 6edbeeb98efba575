"""What ran during a call, from torch's profiler; above all which attention kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench

#: what the dispatcher calls the implementations of attention
BACKENDS = ("flash_attention", "efficient_attention", "cudnn_attention", "attention_math")
#: what their kernels have in their names
KERNELS = ("flash", "fmha", "attention", "cudnn_generated", "sdpa")
LONGEST = 48


def profiled(bench: Bench, function: Callable[[], object]) -> list[FunctionEventAvg]:
    """What torch's profiler saw of one call, after another that warmed up: averages by name."""
    function()
    bench.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=activities) as profiler:
        function()
        bench.synchronize()
    return list(profiler.key_averages())


def attention_kernels(bench: Bench, function: Callable[[], object]) -> str:
    """Implementations that torch chose, and on a GPU their kernels with their milliseconds, the longest first."""
    events = profiled(bench, function)
    chosen = sorted(
        {backend for event in events for backend in BACKENDS if backend in event.key and "aten" in event.key}
    )
    kernels = []
    if bench.cuda:
        found = [event for event in events if any(word in event.key.lower() for word in KERNELS)]
        found = [event for event in found if "aten" not in event.key and event.self_device_time_total > 0]
        found.sort(key=lambda event: -event.self_device_time_total)
        kernels = [f"{event.key[:LONGEST]} {event.self_device_time_total / 1e3:.2f} ms" for event in found[:3]]
    return "; ".join([*chosen, *kernels])
