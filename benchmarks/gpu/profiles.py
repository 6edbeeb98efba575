"""Which attention kernels ran, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench

#: what the dispatcher calls the implementations of attention
BACKENDS = ("flash_attention", "efficient_attention", "cudnn_attention", "attention_math")
#: what their kernels have in their names
KERNELS = ("flash", "fmha", "attention", "cudnn_generated", "sdpa")
LONGEST = 48


def attention_kernels(bench: Bench, function: Callable[[], object]) -> str:
    """Implementations that torch chose, and on a GPU their kernels with their milliseconds, the longest first."""
    function()
    bench.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=activities) as profiler:
        function()
        bench.synchronize()
    events = profiler.key_averages()
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
