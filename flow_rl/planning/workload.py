"""How much one iteration of a run does: what its stage says, and what callbacks and validation draw besides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flow_rl.models.workload import Drawing, Workload
from flow_rl.planning.setup import Setup


def workload_of(setup: Setup) -> Workload | None:
    """The workload of a run; None for a stage whose work is not counted."""
    work = setup.model.workload(setup.prompts, ranks=setup.ranks)
    return None if work is None else replace(work, drawings=tuple(_drawings(setup)))


def _drawings(setup: Setup) -> Iterator[Drawing]:
    for demands in setup.demands:
        yield from demands.drawings
    if setup.data is not None and setup.trainer.get("limit_val_batches") != 0:
        prompts = max((part.eval_batch_size for part in setup.tasks.values()), default=1)
        yield Drawing(name="validation", prompts=prompts, swaps_weights=bool(setup.averages))
