"""What every objective does with a rollout, and the records it does it with.

Three steps: `prepare` what is constant over a rollout's updates, cut the (sample, step) pairs into micro-batches,
and give each micro-batch's share of the full-batch loss. Pairs are ordered prompt by prompt, so a micro-batch shares
text prefixes; no result depends on the cut.

Shapes: P prompts, N samples, S latent tokens, C latent channels, K trained steps a sample, M pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.distributed.devices import to_device
from flow_rl.flow.rollout import Trajectory
from flow_rl.models import Conditioning, ImageModel
from flow_rl.rl.settings import ObjectiveSettings, RolloutSettings

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What an update knows of a rollout.

    Attributes:
        prompts: P prompts.
        trajectory: final latents (N, S, C) and, at the stochastic steps, states and next states (K, N, S, C).
        sigmas: the schedule (T + 1,), on the host.
        conditioning: of the N samples.
        unconditional: of the N samples with a blank prompt; None unless guidance is part of the objective.
        members: which image of its group each sample is, length N.
        iteration: keys this iteration's noise.
        seed: of the noise.
    """

    prompts: Prompts
    trajectory: Trajectory
    sigmas: Tensor
    conditioning: Conditioning
    unconditional: Conditioning | None
    members: tuple[int, ...]
    iteration: int
    seed: int

    @property
    def ids(self) -> list[int]:
        """Prompt id of each sample."""
        return [self.prompts.ids[row] for row in self.conditioning.rows.tolist()]

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self.trajectory.latents.device

    @cached_property
    def step_sigmas(self) -> tuple[Tensor, Tensor]:
        """Noise levels before and after each recorded step, each (K,), copied to the latents' device once."""
        index = torch.tensor(self.trajectory.steps)
        return to_device(self.sigmas[index], self.device), to_device(self.sigmas[index + 1], self.device)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """M (sample, step) pairs.

    Attributes:
        sample: index into the N samples, int64 (M,), on the device of the tensors that it indexes.
        step: index into the K steps, int64 (M,), there as well.
        samples: the same as `sample`, known to the host.
        steps: the same as `step`, known to the host.
    """

    sample: Tensor
    step: Tensor
    samples: tuple[int, ...]
    steps: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.samples)


def micro_batches(
    num_samples: int,
    num_steps: int,
    size: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
) -> Iterator[Pairs]:
    """All pairs, sample by sample, in pieces of at most `size`.

    The indices are counted on the device and on the host, so that neither waits for the other.

    Args:
        num_samples: N.
        num_steps: K.
        size: most pairs of a piece.
        device: of the tensors that will be indexed.
    """
    total = num_samples * num_steps
    for start in range(0, total, size):
        numbers = range(start, min(start + size, total))
        index = torch.arange(numbers.start, numbers.stop, device=device)
        yield Pairs(
            sample=index // num_steps,
            step=index % num_steps,
            samples=tuple(number // num_steps for number in numbers),
            steps=tuple(number % num_steps for number in numbers),
        )


class Objective(ABC):
    """How a rollout turns into losses.

    Args:
        rollout_settings: how the rollout was made.
        settings: of the objective.
    """

    #: whether rollout and `prepare` see the old policy's weights rather than the policy's own
    uses_old_policy = False
    #: whether `prepare_reference` needs the weights from before training
    uses_reference = False
    #: whether every update of a rollout has a preparation of its own, rather than sharing that of the first
    prepares_each_update = False
    #: whether the rollout is stochastic at the steps of a window
    uses_window = False

    def __init__(self, rollout_settings: RolloutSettings, settings: ObjectiveSettings) -> None:
        self.rollout_settings = rollout_settings
        self.settings = settings

    @abstractmethod
    def steps_a_sample(self, rollout: Rollout) -> int:
        """K, the number of pairs each sample gives an update."""

    @abstractmethod
    def prepare(self, model: ImageModel, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """What the weights before the first update give, as (K, N, ...) tensors by name, detached.

        Args:
            model: with the old policy's weights applied where `uses_old_policy`.
            rollout: of this iteration.
            update: from 0; always 0 unless `prepares_each_update`.
        """

    def prepare_reference(self, model: ImageModel, rollout: Rollout, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the reference weights, applied now, add to `prepared`."""
        return {}

    @abstractmethod
    def loss(
        self,
        model: ImageModel,
        rollout: Rollout,
        advantages: Tensor,
        pairs: Pairs,
        prepared: dict[str, Tensor],
        denominator: int,
    ) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the mean over `denominator` pairs, and its detached metrics.

        Advantages (N,) that are on the device of the latents already cost no wait.
        """
