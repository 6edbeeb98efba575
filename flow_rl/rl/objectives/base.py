"""What every objective does with a rollout, and the records it does it with.

An objective is a plug-in: a class with its own settings, named in the config by class path. An update takes three
steps. `prepare` computes what is constant over a rollout's updates. The (sample, step) pairs are cut into
micro-batches. `loss` gives each micro-batch's share of the full-batch loss. Pairs are ordered prompt by prompt, so
that a micro-batch shares text prefixes. No result depends on the cut.

Shapes: P prompts, N samples, S latent tokens, C latent channels, K trained steps a sample, M pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.distributed.devices import to_device
from flow_rl.errors import check_above_zero, check_at_least
from flow_rl.flow.objectives.rows import Metrics
from flow_rl.flow.rollout import Trajectory
from flow_rl.flow.windows import steps_of_iteration
from flow_rl.models import Conditioning, ImageModel
from flow_rl.rl.settings import RolloutSettings

#: where an objective's settings are in a config
SETTINGS = "model.objective"


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A chunk of an iteration: groups that were rolled out together, and what an update needs of them.

    Attributes:
        settings: how the images were made.
        prompts: P prompts.
        images: in [0, 1], members of a group side by side, shape (N, 3, H, W).
        trajectory: final latents (N, S, C) and, at the stochastic steps, states and next states (K, N, S, C).
        sigmas: the schedule (T + 1,), on the host.
        conditioning: of the N samples.
        unconditional: of the N samples with a blank prompt; None unless guidance is part of the objective.
        members: which image of its group each sample is, length N.
        iteration: keys this iteration's noise.
        seed: of the noise.
    """

    settings: RolloutSettings
    prompts: Prompts
    images: Tensor
    trajectory: Trajectory
    sigmas: Tensor
    conditioning: Conditioning
    unconditional: Conditioning | None
    members: tuple[int, ...]
    iteration: int
    seed: int

    def __len__(self) -> int:
        return len(self.members)

    @property
    def ids(self) -> list[int]:
        """Prompt id of each sample."""
        return [self.prompts.ids[row] for row in self.conditioning.rows.tolist()]

    @property
    def group_size(self) -> int:
        """G, images a prompt."""
        return len(self) // len(self.prompts)

    @property
    def groups(self) -> Tensor:
        """Group of each sample, int64 (N,)."""
        return self.prompts.groups.repeat_interleave(self.group_size)

    @property
    def categories(self) -> tuple[str, ...]:
        """Category of each sample, length N."""
        return tuple(category for category in self.prompts.categories for _ in range(self.group_size))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task of each sample, length N."""
        return (self.prompts.task,) * len(self)

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self.trajectory.latents.device

    @cached_property
    def step_sigmas(self) -> tuple[Tensor, Tensor]:
        """Noise levels before and after each recorded step, each (K,), copied to the latents' device once."""
        index = torch.tensor(self.trajectory.steps)
        return to_device(self.sigmas[index], self.device), to_device(self.sigmas[index + 1], self.device)

    def release_images(self) -> Rollout:
        """The same with its images on the host: an update needs none of them on the device."""
        return replace(self, images=self.images.cpu())


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
    """All pairs, sample by sample, in micro-batches of at most `size`.

    The indices are counted on the device and on the host, so that neither waits for the other.

    Args:
        num_samples: N.
        num_steps: K.
        size: most pairs of a micro-batch.
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

    A new objective is one file: a subclass that takes its own settings as keyword arguments, passes the others on,
    and is named in the config (`model.objective.class_path`).

    One rule holds for all objectives: an update is what the samples that teach would give alone. A sample that teaches
    nothing (see `Outcome.teaches`) goes through the same forwards, so that ranks stay in step. It has weight 0 in every
    term of the loss, and the loss is a mean over the samples that teach, on all ranks. This includes the term that
    pulls to the reference: its strength relative to the rewards does not depend on how many groups are flat. `losses`
    divides by the number of all pairs, since gradients accumulate before the last scores arrive. The training step
    rescales them once it knows how many samples teach. Flow-GRPO's code likewise drops samples without an advantage.

    Args:
        updates: optimizer steps a rollout.
        micro_batch_size: (sample, step) pairs a backward. It bounds memory and changes nothing else.
        advantage_clip: advantages are clipped to plus and minus this.

    Attributes:
        reference_scale: a factor of the weight that the objective gives to the distance from its reference. A callback
            may raise it during a run.
    """

    #: whether the rollout is stochastic at the steps of its window
    samples_stochastically = False
    #: TensorBoard charts of its metrics: patterns of tags (`update/...`) by title
    charts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    #: whether every update of a rollout has a preparation of its own, rather than sharing that of the first
    prepares_each_update = False

    def __init__(self, *, updates: int = 1, micro_batch_size: int = 32, advantage_clip: float = 5.0) -> None:
        self.updates = updates
        self.micro_batch_size = micro_batch_size
        self.advantage_clip = advantage_clip
        self.reference_scale = 1.0

    # ----------------------------------------------------------------- what it needs of a run

    @property
    def uses_old_policy(self) -> bool:
        """Whether rollout and `prepare` see the old policy's weights rather than the policy's own."""
        return False

    @property
    def uses_reference(self) -> bool:
        """Whether `prepare_reference` needs the weights from before training."""
        return False

    @property
    def prepares_forwards(self) -> bool:
        """Whether `prepare` evaluates the model at every pair. `train.py doctor` counts it."""
        return self.uses_old_policy

    def stochastic_steps(self, settings: RolloutSettings, *, iteration: int, seed: int) -> tuple[int, ...]:
        """The steps of an iteration at which the rollout is stochastic; none for an objective of ODE rollouts."""
        if not self.samples_stochastically:
            return ()
        return steps_of_iteration(settings.window, settings.num_steps, iteration=iteration, seed=seed)

    @abstractmethod
    def pairs_per_sample(self, settings: RolloutSettings) -> int:
        """K, the number of pairs that each sample gives an update."""

    def check(self, settings: RolloutSettings, sigmas: Sequence[float]) -> None:
        """Refuse settings that would train silently wrong, before a model loads.

        A subclass extends it.

        Args:
            settings: how the images are made.
            sigmas: the schedule, T + 1 noise levels from 1 down to 0.

        Raises:
            ValueError: with what was received, why it is refused and what to change.
        """
        check_at_least(1, SETTINGS, updates=self.updates, micro_batch_size=self.micro_batch_size)
        check_above_zero(SETTINGS, advantage_clip=self.advantage_clip)

    def old_decay_at(self, iteration: int) -> float:
        """Share of the old policy that stays when it follows after the updates of an iteration, in [0, 1)."""
        return 0.0

    # ----------------------------------------------------------------- an update

    @abstractmethod
    def prepare(self, model: ImageModel, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """What the weights before the first update give, as (K, N, ...) tensors by name, detached.

        Args:
            model: with the old policy's weights applied where `uses_old_policy`.
            rollout: of this iteration.
            update: from 0; always 0 unless `prepares_each_update`.
        """

    def prepare_reference(
        self, model: ImageModel, rollout: Rollout, prepared: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the reference weights, applied now, add to `prepared`."""
        return {}

    @abstractmethod
    def loss(
        self,
        model: ImageModel,
        rollout: Rollout,
        advantages: Tensor,
        pairs: Pairs,
        prepared: Mapping[str, Tensor],
        denominator: int,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the sum over all pairs divided by `denominator`, and its detached metrics.

        Advantages and weights (N,) that are on the device of the latents already cost no wait.

        Args:
            model: with the policy's weights.
            rollout: N samples.
            advantages: one a sample, shape (N,).
            pairs: the M pairs of this micro-batch.
            prepared: see `prepare`.
            denominator: pairs of the whole update.
            weights: 1 for a sample that teaches and 0 for one that does not, float32 (N,); None: all of them teach.
                They multiply all terms of a pair's loss.
        """

    def losses(
        self,
        model: ImageModel,
        rollout: Rollout,
        advantages: Tensor,
        prepared: Mapping[str, Tensor],
        *,
        teaches: Tensor | None = None,
        pairs: int | None = None,
    ) -> Iterator[tuple[int, Tensor, Metrics]]:
        """Micro-batch by micro-batch: its number of pairs, its loss and its metrics. See `loss`.

        Args:
            model: with the policy's weights.
            rollout: N samples.
            advantages: one a sample, shape (N,).
            prepared: see `prepare`.
            teaches: see `Outcome.teaches`, bool (N,), on the host; None: all samples teach.
            pairs: of the whole update, of which this rollout is a part; None: it is all of it.
        """
        steps = self.pairs_per_sample(rollout.settings)
        advantages = to_device(advantages, rollout.device)
        denominator = pairs or len(rollout) * steps
        weights = None
        if teaches is not None and not bool(teaches.all()):
            weights = to_device(teaches.float(), rollout.device)
        for some in micro_batches(len(rollout), steps, self.micro_batch_size, rollout.device):
            yield len(some), *self.loss(model, rollout, advantages, some, prepared, denominator, weights)
