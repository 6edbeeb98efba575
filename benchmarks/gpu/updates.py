"""Forward and backward of micro-batches at real size: speed, and memory against the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.evaluations import SIGMA, flops_of, prepare
from benchmarks.gpu.machine import rates
from benchmarks.gpu.policies import planned, planned_moment_gb, policy
from benchmarks.gpu.random_model import RandomQwenImage21, scale_of, shared_model
from benchmarks.gpu.timing import seconds
from flow_rl.planning.plan import Plan


def backward_of(
    bench: Bench, model: RandomQwenImage21, *, size: int, pairs: int, edit: bool = False
) -> Callable[[], Tensor]:
    """Forward and backward of the pairs of one prompt, whose prefix they share and compute with gradient."""
    work = prepare(bench, model, size=size, edit=edit, guided=False, samples=pairs, cached=False)

    def update() -> Tensor:
        model.transformer.zero_grad(set_to_none=True)
        velocity = model.velocity(work.latents, SIGMA, work.branches.conditional)
        velocity.square().mean().backward()
        return velocity.detach()

    return update


def updates(bench: Bench) -> Iterator[Row]:
    """Micro-batches of several sizes, activations kept and recomputed: seconds a pair, and memory."""
    scale = scale_of(bench)
    model = shared_model(bench)
    transformer = model.transformer.train()
    cases = [(scale.size, False, pairs, c) for c in (False, True) for pairs in scale.micro_batches]
    cases += [(scale.size, True, scale.micro_batches[1], c) for c in (False, True)]
    cases += [(scale.large, False, scale.micro_batches[0], c) for c in (False, True)]
    for size, edit, pairs, checkpointing in cases:
        plan = planned(bench, policy(scale, size=size, micro_batch=pairs, checkpointing=checkpointing), edit=edit)

        def measure(
            size: int = size,
            edit: bool = edit,
            pairs: int = pairs,
            checkpointing: bool = checkpointing,
            plan: Plan = plan,
        ) -> dict[str, Any]:
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            try:
                update = backward_of(bench, model, size=size, pairs=pairs, edit=edit)
                bench.reset_peak()  # of the update, not of the VAE that encoded a source
                flops, velocity = flops_of(model, update)
                taken = seconds(bench, update, repeats=3)
                gradients = [p.grad for p in transformer.parameters() if p.requires_grad]
                wrong = sum(g is None or not bool(torch.isfinite(g).all()) for g in gradients)
            finally:
                transformer.disable_gradient_checkpointing()
                transformer.zero_grad(set_to_none=True)
            return {
                "seconds_a_pair": taken / pairs,
                **rates(bench, flops, taken),
                "planned_gb": planned_moment_gb(
                    plan, "update, forward", "update, backward", weights=("transformer", "VAE", "gradients")
                ),
                "not_finite": wrong + int(not bool(torch.isfinite(velocity).all())),
            }

        name = f"{'edit' if edit else 't2i'} {size}, {pairs} pairs{', checkpointing' if checkpointing else ''}"
        yield bench.row(name, measure, {"not_finite": 0})
    transformer.eval()
