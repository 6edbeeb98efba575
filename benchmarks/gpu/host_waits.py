"""How often the host waits for the device, by phase of an iteration and by line.

torch warns of every operation that synchronises (`torch.cuda.set_sync_debug_mode`), except for `Event.synchronize`,
`Stream.synchronize` and copies that another stream makes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.first_ratio import ADVANTAGES, PROMPTS, made, use
from flow_rl.rl.sampling import guided_velocity

Result = TypeVar("Result")
#: lines that are named in the report
TOP = 3


def counted(bench: Bench, function: Callable[[], Result]) -> tuple[Result, Counter[str]]:
    """What a function returns, and its waits by file and line; none are seen on a CPU."""
    bench.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if bench.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function()
        finally:
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("default")
    synchronising = (w for w in caught if "synchronizing" in str(w.message))
    return result, Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in synchronising)


def host_waits(bench: Bench) -> Iterator[Row]:
    """Waits of each phase of a clipped LoRA iteration on the demo base: 2 prompts x 2 images, 4 steps, 2 trained."""
    module = made(bench, "clipped", "flow_sde", torch.float32, lora=True)
    model, sampler = module.model, module.sampler
    use(module, "clipped", 8)

    def iteration() -> Iterator[tuple[str, Counter[str]]]:
        with torch.no_grad():
            branches, waits = counted(bench, lambda: sampler.encode(model, PROMPTS.texts))
            yield "encode, both branches", waits
            cached, waits = counted(bench, lambda: branches.cached(model).repeat_interleave(2))
            yield "prefixes, both branches", waits
            latents = sampler.initial_noise(
                model, step=0, ids=[11, 11, 12, 12], members=[0, 1, 0, 1], device=bench.device
            )
            velocity = guided_velocity(model, cached.conditional, cached.unconditional, sampler.guidance)
            velocity(latents, 0, 1.0)
            _, waits = counted(bench, lambda: velocity(latents, 0, 1.0))
            yield "one guided evaluation", waits
            _, waits = counted(bench, lambda: model.decode(latents))
            yield "decode", waits
        rollout, waits = counted(bench, lambda: module.roll_out(PROMPTS))
        yield "whole rollout", waits
        prepared, waits = counted(bench, lambda: module.prepare(rollout, 0))
        yield "prepare", waits
        _, waits = counted(bench, lambda: module.accumulate_gradients(rollout, ADVANTAGES, prepared))
        yield "one micro-batch, forward and backward", waits

    list(iteration())  # what happens once is not counted
    for name, waits in iteration():
        lines = ", ".join(f"{line} x{count}" for line, count in waits.most_common(TOP))
        yield Row(name=name, values={"waits": waits.total() if bench.cuda else None, "most": lines})
