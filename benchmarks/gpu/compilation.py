"""Compiled blocks against eager ones at real size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row, relative
from benchmarks.gpu.evaluations import evaluation, prepare
from benchmarks.gpu.random_model import scale_of, shared_model
from benchmarks.gpu.timing import seconds
from benchmarks.gpu.updates import backward_of
from flow_rl.models.compilation import compile_blocks, repeated_blocks


def compilation(bench: Bench) -> Iterator[Row]:
    """Blocks compiled by torch against eager ones: seconds of a rollout and an update, and the error."""
    scale = scale_of(bench)
    model = shared_model(bench)
    work = prepare(bench, model, size=scale.size, guided=False)
    evaluate = evaluation(model, work)
    update = backward_of(bench, model, size=scale.size, pairs=scale.micro_batches[1])
    eager = evaluate()
    base = {"evaluation": seconds(bench, evaluate), "update": seconds(bench, update)}
    # Without a compiler, as on a CPU that only tries the script, tracing alone shows that the blocks can be compiled.
    backend = {} if bench.cuda else {"backend": "eager"}
    compile_blocks(model, **backend)
    try:
        for name, function in (("evaluation", evaluate), ("update", update))[: 1 if bench.tiny else 2]:
            start = time.perf_counter()
            output = function()
            bench.synchronize()
            compiling = time.perf_counter() - start

            def measure(
                name: str = name, function: Callable[[], Tensor] = function, compiling: float = compiling,
                output: Tensor = output,
            ) -> dict[str, Any]:  # fmt: skip
                taken = seconds(bench, function)
                return {
                    "eager_s": base[name],
                    "compiled_s": taken,
                    "speed_up": base[name] / taken,
                    "first_call_s": compiling,
                    "difference": relative(output, eager) if name == "evaluation" else None,
                }

            yield bench.row(name, measure)
    finally:
        for block in repeated_blocks(model.transformer):
            del block.forward  # the class's own comes back
        model.compiled = False
        torch._dynamo.reset()
