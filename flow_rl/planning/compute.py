"""Operations of one iteration, and seconds on a device at an assumed utilisation."""

from __future__ import annotations

from dataclasses import dataclass

from flow_rl.models.workload import Workload
from flow_rl.planning.devices import Device
from flow_rl.planning.readings import Readings


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Operations of one rank in an iteration, by phase."""

    phases: dict[str, float]

    @property
    def total(self) -> float:
        """Operations of one rank in an iteration."""
        return sum(self.phases.values())

    def seconds(self, device: Device, utilisation: float) -> float:
        """Seconds an iteration takes where the device does `utilisation` of its peak; rewards run meanwhile or add."""
        return self.total / (device.tflops * 1e12 * utilisation)


def compute_of(work: Workload, readings: Readings, *, micro_batch: int) -> Compute:
    """Operations by phase; text encoder and VAE, a few per cent at 40 steps, are left out.

    Args:
        work: the iteration.
        readings: of its moments. A rollout's prefixes, computed once, are left out.
        micro_batch: pairs of the update that was read.
    """
    rollout, update = readings.rollout, readings.update
    pair = micro_batch * (2 if work.guided_update else 1)  # the unconditional branch counts as an evaluation of its own
    cost = {
        "rollout, unconditional": (rollout.unconditional or rollout.conditional).flops / work.rollout_batch,
        "training": (update.forward.flops + update.backward.flops) / pair,
    }
    if readings.teacher is not None:
        # Guided or not, an evaluation counts once a branch; the prefix is computed anew with each.
        branches = 1 if readings.teacher.unconditional is None else 2
        taught = readings.teacher.prefix.flops + readings.teacher.evaluation.flops
        cost["teacher"] = taught / micro_batch / branches
    phases = {}
    for phase in work.phases:
        rolls = "rollout" in phase.name
        other = rollout.conditional.flops / work.rollout_batch if rolls else update.forward.flops / pair
        phases[phase.name] = phase.evaluations * cost.get(phase.name, other)
    return Compute(phases=phases)
