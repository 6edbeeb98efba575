"""The whole plan of a run, and a proposal that makes it fit another machine.

A proposal never touches groups x size x updates: what is learnt stays the same, only how it is cut changes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flow_rl.errors import SettingError
from flow_rl.models.workload import Workload
from flow_rl.planning.compute import Compute, compute_of
from flow_rl.planning.devices import Device
from flow_rl.planning.memory import Memory, memory_of
from flow_rl.planning.readings import micro_case, read
from flow_rl.planning.setup import Setup
from flow_rl.planning.weights import Components
from flow_rl.planning.workload import workload_of

#: share of a device's memory that a proposal fills
HEADROOM = 0.9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does and takes.

    Attributes:
        setup: the run.
        parts: its model on the meta device.
        work: its workload.
        memory: of one rank.
        compute: operations of one rank.
    """

    setup: Setup
    parts: Components
    work: Workload
    memory: Memory
    compute: Compute

    @property
    def peak(self) -> int:
        """Bytes on one rank's device at the fullest moment."""
        return self.memory.peak


def make_plan(setup: Setup, parts: Components) -> Plan | None:
    """The plan of a run; None for stages whose work is not counted.

    Args:
        setup: the run.
        parts: its model on the meta device.
    """
    work = workload_of(setup)
    return None if work is None else _plan_of(setup, parts, work)


def _plan_of(setup: Setup, parts: Components, work: Workload) -> Plan:
    readings = read(setup, parts, work)
    compute = compute_of(work, readings, micro_batch=micro_case(setup, work).samples)
    memory = memory_of(setup, parts, work, readings)
    return Plan(setup=setup, parts=parts, work=work, memory=memory, compute=compute)


def fit(plan: Plan, number: int, device: Device) -> Plan:
    """The fastest way of cutting the same work that fits.

    Tried in this order: weights that rest on the device before the host, no checkpointing before checkpointing, large
    micro-batches before small ones.

    Args:
        plan: of the run as configured.
        number: of devices.
        device: which.

    Raises:
        SettingError: prompts that so many devices cannot share, or nothing that fits.
    """
    setup, work = plan.setup, plan.work
    if work.groups % number:
        fitting = [n for n in range(number, 0, -1) if work.groups % n == 0]
        raise SettingError(
            f"--fit: {work.groups} groups a step cannot be shared by {number} devices without changing what is learnt. "
            f"{fitting[0]} devices can, or set data.prompts_per_step to a multiple of {number} and accept another "
            "batch."
        )
    shards = number if setup.generator.lora is None or setup.shards > 1 else 1
    for offload, checkpointing in _switches(shards):
        changes = {"offload": offload, "checkpointing": checkpointing}
        changed = replace(setup, changes=changes | {"ranks": number, "shards": shards})
        mine = workload_of(changed)
        assert mine is not None, "a plan is of a stage whose work is counted"

        def cut(size: int, changed: Setup = changed, mine: Workload = mine) -> Plan:
            batch = min(max(size, work.group_size), mine.samples_a_rank)
            return _plan_of(changed, plan.parts, replace(mine, micro_batch=size, rollout_batch=batch))

        sizes = _halvings(max(1, mine.pairs // number))
        smallest = cut(sizes[-1])
        if smallest.peak <= HEADROOM * device.memory:
            # A smaller micro-batch takes less, so the first of the large ones that fits is found by halving.
            return cut(sizes[bisect_left(sizes, True, key=lambda size: cut(size).peak <= HEADROOM * device.memory)])
    raise SettingError(
        f"--fit: even with micro-batches of 1, checkpointing and offloaded weights a rank needs "
        f"{smallest.peak / 1e9:.0f} GB, and a {device.name} has {device.memory / 1e9:.0f}. Use more devices or larger "
        "ones, a smaller image_size, an adapter (model.lora) or frozen_dtype bfloat16."
    )


def _switches(shards: int) -> Iterator[tuple[bool, bool]]:
    """Offload and checkpointing, from what costs least time to what costs most."""
    for offload in (False, True) if shards > 1 else (False,):
        for checkpointing in (False, True):
            yield offload, checkpointing


def _halvings(most: int) -> list[int]:
    """Micro-batches that cut the pairs evenly, from 64 down to 1."""
    return [size for size in (64, 32, 16, 8, 4, 2, 1) if size <= most and most % size == 0]
