"""Operations of one iteration, and seconds on a device at an assumed utilisation."""

from __future__ import annotations

from dataclasses import dataclass

from doctor.devices import Device
from doctor.probe import ForwardCost
from doctor.workload import Workload

#: operations of forward and backward together, in forwards: all weights trained, or an adapter on frozen ones
FULL_BACKWARD, ADAPTER_BACKWARD = 3.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Operations of one rank in an iteration, by phase, 10^12 each."""

    phases: dict[str, float]

    @property
    def total(self) -> float:
        """10^12 operations of one rank in an iteration."""
        return sum(self.phases.values())

    def seconds(self, device: Device, utilisation: float) -> float:
        """Seconds an iteration takes where the device does `utilisation` of its peak; rewards run meanwhile or add."""
        return self.total / (device.tflops * utilisation)


def compute_of(
    work: Workload, update: ForwardCost, rollout: ForwardCost, *, micro_batch: int, adapter: bool, checkpointing: bool
) -> Compute:
    """Operations by phase; text encoder and VAE, a few per cent at 40 steps, are left out.

    Args:
        work: the iteration.
        update: cost of a forward of `micro_batch` pairs.
        rollout: cost of a forward of the rollout's batch. Its prefixes, computed once a rollout, are counted each step.
        micro_batch: pairs of `update`.
        adapter: an adapter is trained.
        checkpointing: a further forward in the backward pass.
    """
    phases = {}
    for phase in work.phases:
        per_sample = update.flops / micro_batch
        factor = 1.0
        if "rollout" in phase.name:
            per_sample = rollout.flops / work.rollout_batch
        if phase.backward:
            factor = (ADAPTER_BACKWARD if adapter else FULL_BACKWARD) + (1.0 if checkpointing else 0.0)
        phases[phase.name] = phase.evaluations * per_sample * factor / 1e12
    return Compute(phases=phases)
