"""Where the time of an evaluation and of an update goes at real size, by kind of kernel, and what the host adds.

The host enqueues kernels while the device runs them. Where `host_s` is close to `seconds`, the host is the limit:
larger micro-batches or compiled blocks help, and a faster device does not.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.autograd import DeviceType

from benchmarks.gpu.bench import Bench, Row, Value
from benchmarks.gpu.evaluations import evaluation, prepare
from benchmarks.gpu.profiles import profiled
from benchmarks.gpu.random_model import RandomQwenImage21, scale_of, shared_model
from benchmarks.gpu.timing import seconds
from benchmarks.gpu.updates import backward_of
from flow_rl.models.adapters import STUDENT_ADAPTER, use_adapter

#: kinds of kernels, by a pattern that their names match; the first match counts
KINDS = {
    "attention": r"sdpa|flash|fmha|attention",
    "products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk",
    "sums": r"reduce|norm|softmax",
    "copies": r"copy|memcpy|memset|cat|index|gather|scatter",
    "elementwise": r"elementwise|fill",
}
#: kernels that are named in the report, and how much of a name
LONGEST, CHARACTERS = 4, 60


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What ran on the device during a call.

    Attributes:
        seconds: by kind of kernel.
        count: kernels in all.
        longest: the kernels that took most in all, with their milliseconds.
    """

    seconds: Counter[str]
    count: int
    longest: str


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    lower = kernel.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lower)), "other")


def kernels_of(bench: Bench, function: Callable[[], object]) -> Kernels:
    """The kernels of one call; none on a CPU."""
    ran = [e for e in profiled(bench, function) if e.device_type == DeviceType.CUDA and e.self_device_time_total > 0]
    spent: Counter[str] = Counter()
    for event in ran:
        spent[kind_of(event.key)] += event.self_device_time_total / 1e6
    ran.sort(key=lambda event: -event.self_device_time_total)
    longest = "; ".join(
        f"{e.key[:CHARACTERS]} x{e.count} {e.self_device_time_total / 1e3:.1f} ms" for e in ran[:LONGEST]
    )
    return Kernels(seconds=spent, count=sum(event.count for event in ran), longest=longest)


def broken_down(bench: Bench, function: Callable[[], object]) -> dict[str, Value]:
    """Seconds of a call, of its enqueueing alone, and of its kernels by kind."""
    function()
    bench.synchronize()
    start = time.perf_counter()
    function()
    host = time.perf_counter() - start
    bench.synchronize()
    kernels = kernels_of(bench, function)
    values: dict[str, Value] = {"seconds": seconds(bench, function, repeats=3), "host_s": host}
    if bench.cuda:
        values |= {"busy_s": kernels.seconds.total(), "kernels": kernels.count}
        values |= {f"{kind}_s": kernels.seconds[kind] for kind in (*KINDS, "other")}
        values["longest"] = kernels.longest
    return values


def breakdown(bench: Bench) -> Iterator[Row]:
    """Evaluations with and without an adapter, and updates of several sizes."""
    scale, model = scale_of(bench), shared_model(bench)
    evaluate = evaluation(model, prepare(bench, model, size=scale.size, guided=False))
    yield bench.row("evaluation, LoRA", lambda: broken_down(bench, evaluate))
    use_adapter(model.transformer, None)
    yield bench.row("evaluation, base", lambda: broken_down(bench, evaluate))
    use_adapter(model.transformer, STUDENT_ADAPTER)
    yield from _updates(bench, model)


def _updates(bench: Bench, model: RandomQwenImage21) -> Iterator[Row]:
    scale = scale_of(bench)
    transformer = model.transformer.train()
    pairs = (scale.micro_batches[0], scale.micro_batches[-2])
    for count, checkpointing in ((pairs[0], False), (pairs[1], False), (pairs[1], True)):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        try:
            update = backward_of(bench, model, size=scale.size, pairs=count)
            name = f"update, {count} pairs{', checkpointing' if checkpointing else ''}"
            yield bench.row(name, lambda update=update: broken_down(bench, update))
        finally:
            transformer.disable_gradient_checkpointing()
            transformer.zero_grad(set_to_none=True)
    transformer.eval()
