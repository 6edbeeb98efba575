"""The loop that a first implementation has: every sample alone with its prompt, both branches in full at every step.

It is what a plain pipeline does: prefix and target in one forward, no keys and values kept, no prompt shared by a
group, and two such forwards for a guided evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.evaluations import GUIDANCE, SIGMA, Work, evaluation, prepare, separate
from benchmarks.gpu.random_model import RandomQwenImage21, scale_of, shared_model
from benchmarks.gpu.timing import seconds
from benchmarks.gpu.updates import backward_of
from flow_rl.rl.sampling import Branches


def apart(work: Work, count: int | None = None) -> Work:
    """The first `count` samples, nothing shared."""
    kept = slice(0, count or len(work.latents))
    both = (work.branches.conditional, work.branches.unconditional)
    conditional, blank = (separate(branch.select(kept)) for branch in both)
    return Work(branches=Branches(conditional=conditional, unconditional=blank), latents=work.latents[kept])


@torch.no_grad()
def guided(model: RandomQwenImage21, work: Work) -> Tensor:
    """A guided velocity by two whole forwards."""
    conditional = model.velocity(work.latents, SIGMA, work.branches.conditional)
    blank = model.velocity(work.latents, SIGMA, work.branches.unconditional)
    return blank + GUIDANCE * (conditional - blank)


def naive(bench: Bench) -> Iterator[Row]:
    """Seconds of one guided evaluation and of one trained pair, ours (prefixes kept) and naive."""
    scale = scale_of(bench)
    model = shared_model(bench)
    for edit in (False, True):
        task = f"{'edit' if edit else 't2i'} {scale.size}"
        kept = prepare(bench, model, size=scale.size, edit=edit)
        anew = replace(prepare(bench, model, size=scale.size, edit=edit, cached=False), latents=kept.latents)
        ours = seconds(bench, evaluation(model, kept), repeats=3) / scale.samples
        for count in (scale.samples, 1):
            work = apart(anew, count)

            def measure(work: Work = work, count: int = count, ours: float = ours) -> dict[str, float]:
                theirs = seconds(bench, lambda: guided(model, work), repeats=3) / count
                return {"ours_s": ours, "naive_s": theirs, "times": theirs / ours}

            yield bench.row(f"{task}, guided evaluation of an image, naive {count} at a time", measure)
        pairs = scale.micro_batches[1]
        shared = backward_of(bench, model, size=scale.size, pairs=pairs, edit=edit)
        single = apart(anew, pairs)

        def update(single: Work = single) -> None:
            model.transformer.zero_grad(set_to_none=True)
            model.velocity(single.latents, SIGMA, single.branches.conditional).square().mean().backward()

        def compare(ways: tuple[Callable[[], object], ...] = (shared, update), pairs: int = pairs) -> dict[str, float]:
            ours, theirs = (seconds(bench, way, repeats=3) / pairs for way in ways)
            return {"ours_s": ours, "naive_s": theirs, "times": theirs / ours}

        yield bench.row(f"{task}, update of a pair, {pairs} at a time", compare)
        model.transformer.zero_grad(set_to_none=True)
