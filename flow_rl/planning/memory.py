"""Memory of one rank in bytes: what is always there, and what each moment of an iteration adds.

Moments follow one another, so the peak is that of the fullest one. Weights, gradients and optimizer states are exact;
the rest is read from the project's own code on the meta device (`flow_rl.planning.bench`).

Not counted: the driver's context, fragmentation, workspaces of kernels, and what rewards in this process compute.
The forwards of an old policy or a reference are left out, because an update's forward takes more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from flow_rl.models.memory import FROZEN_DTYPES
from flow_rl.models.workload import Drawing, Workload
from flow_rl.planning.bench import Denoising
from flow_rl.planning.readings import Readings
from flow_rl.planning.setup import Setup
from flow_rl.planning.stage import Profile
from flow_rl.planning.stubs import PlannedVLMReward
from flow_rl.planning.weights import Components, count, optimizer_bytes, step_bytes, trained
from flow_rl.rewards.category import CategoryReward

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing in memory.

    Attributes:
        name: of the item.
        size: bytes on one rank's device.
        host: bytes on the host instead, where it is offloaded.
    """

    name: str
    size: int
    host: int = 0


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What exists at one moment of an iteration, beside what is always there."""

    name: str
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Bytes on one rank's device."""
        return sum(item.size for item in self.items)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Everything on one rank."""

    always: tuple[Item, ...]
    moments: tuple[Moment, ...]

    @property
    def fullest(self) -> Moment:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: moment.size)

    @property
    def peak(self) -> int:
        """Bytes on one rank's device at the fullest moment."""
        return sum(item.size for item in self.always) + self.fullest.size


def memory_of(setup: Setup, parts: Components, work: Workload, readings: Readings) -> Memory:
    """Everything that a GRPO or distillation run has in memory.

    Args:
        setup: the run.
        parts: its model on the meta device.
        work: its workload.
        readings: of its moments.
    """
    always = tuple(item for item in _always(setup, parts, work) if item.size or item.host)
    moments = _Moments(setup, parts, work, readings)
    return Memory(always=always, moments=tuple(_nonempty(moment) for moment in moments.all()))


def _nonempty(moment: Moment) -> Moment:
    return Moment(name=moment.name, items=tuple(item for item in moment.items if item.size or item.host))


def _always(setup: Setup, parts: Components, work: Workload) -> Iterator[Item]:
    """Weights and what belongs to them."""
    profile, dtypes, shards, host = setup.profile, setup.generator.dtypes, setup.shards, setup.offload
    trains = trained(parts.transformer)
    values, held, text = count(trains), dtypes.transformer.itemsize, dtypes.text_encoder.itemsize

    def shared(name: str, size: float) -> Item:
        share = math.ceil(size / shards)
        return Item(name=name, size=0 if host else share, host=share if host else 0)

    yield shared("transformer", values * FLOAT + (count(parts.transformer.parameters()) - values) * held)
    yield shared("gradients", values * FLOAT)
    yield shared("optimizer states", optimizer_bytes(profile.make_optimizer).total(trains))
    for name in (*(average.name for average in setup.averages), *work.copies):
        yield shared(name, values * FLOAT)
    yield from _teachers(setup, parts, work)
    yield shared("text encoder", count(parts.text_encoder.parameters()) * text)
    yield Item(name="VAE", size=count(parts.vae.parameters()) * FLOAT)
    yield from _local_rewards(profile)


class _Moments:
    """The moments of one run, in their order."""

    def __init__(self, setup: Setup, parts: Components, work: Workload, readings: Readings) -> None:
        self.setup, self.parts, self.work, self.readings = setup, parts, work, readings
        self.channels = _latent_channels(parts)

    def all(self) -> Iterator[Moment]:
        yield from self._rollout()
        if self.readings.teacher is not None:
            yield self._teacher(self.readings.teacher)
        yield from self._update()
        for drawing, (denoising, decoded) in self.readings.drawings.items():
            extra = tuple(self._beside(drawing))
            yield Moment(name=f"{drawing.name}, denoise", items=(*extra, *self._whole(), *_denoised(denoising)))
            yield Moment(name=f"{drawing.name}, decode", items=(*extra, Item(name="VAE decoder", size=decoded.peak)))

    # ----------------------------------------------------------------- an iteration

    def _rollout(self) -> Iterator[Moment]:
        readings, states, whole = self.readings, self._states(), self._whole()
        encoder = self.parts.text_encoder
        # Under sharding: this layer and the next one, and the embedding, which belongs to the root.
        at_once = 2 * _largest(encoder.model.language_model.layers) + count(encoder.get_input_embeddings().parameters())
        gathered = at_once * self.setup.generator.dtypes.text_encoder.itemsize if self.setup.shards > 1 else 0
        yield Moment(
            name="encode prompts",
            items=(
                states,
                Item(name="gathered layers and embedding", size=gathered),
                Item(name="text encoder's tensors", size=readings.text.peak),
            ),
        )
        if readings.sources is not None:
            yield Moment(name="encode sources", items=(states, Item(name="VAE encoder", size=readings.sources.peak)))
        prefix = Item(name="prefix of both branches", size=readings.rollout.prefix.peak)
        yield Moment(name="prefix", items=(states, *whole, prefix))
        yield Moment(name="denoise", items=(states, *whole, *_denoised(readings.rollout)))
        if self.work.decodes:
            yield Moment(name="decode", items=(states, Item(name="VAE decoder", size=readings.decode.peak)))

    def _teacher(self, reading: Denoising) -> Moment:
        return Moment(name="teacher", items=(self._states(), *self._whole(), *_denoised(reading)))

    def _update(self) -> Iterator[Moment]:
        update = self.readings.update
        kept = Item(name="kept for the backward pass", size=update.forward.kept)
        head = Item(name="the forward at its fullest", size=update.forward.peak - update.forward.kept)
        back = Item(name="the backward at its fullest", size=update.backward.peak)
        yield Moment(name="update, forward", items=(self._states(), *self._whole(), kept, head))
        yield Moment(name="update, backward", items=(self._states(), *self._whole(), kept, back, *self._reduction()))
        step = step_bytes(self.setup.profile.make_optimizer) * count(trained(self.parts.transformer))
        size = 0 if self.setup.offload else math.ceil(step / self.setup.shards)
        yield Moment(name="optimizer step", items=(self._states(), Item(name="optimizer's own tensors", size=size)))

    # ----------------------------------------------------------------- items

    def _whole(self) -> tuple[Item, ...]:
        """The transformer that is evaluated, where it rests in shards."""
        if self.setup.shards == 1:
            return ()
        width = (self.setup.gathered_dtype or self.setup.generator.dtypes.transformer).itemsize
        return (Item(name="gathered transformer", size=count(self.parts.transformer.parameters()) * width),)

    def _reduction(self) -> Iterator[Item]:
        """Gradients of a block on their way to its shards: in the dtype they have, and in float32 to be summed."""
        if self.setup.shards > 1 and trained(self.parts.transformer):
            width = (self.setup.gathered_dtype or self.setup.generator.dtypes.transformer).itemsize + FLOAT
            yield Item(name="a block's gradients, reduced", size=_largest(_units(self.parts)) * width)

    def _states(self) -> Item:
        """Latents that the iteration keeps of every sample."""
        a_sample = self.work.target * self.channels * FLOAT
        return Item(name="latents kept", size=self.work.samples_a_rank * self.work.kept_a_sample * a_sample)

    def _beside(self, drawing: Drawing) -> Iterator[Item]:
        """What is held during a drawing."""
        trains = trained(self.parts.transformer)
        if drawing.keeps_latents:
            yield self._states()
        if drawing.keeps_weights:
            size = math.ceil(count(trains) * FLOAT / self.setup.shards)
            yield Item(name="weights before the step", size=0 if self.setup.offload else size)
        if drawing.swaps_weights:
            largest = math.ceil(max(p.numel() for p in trains) * FLOAT / self.setup.shards)
            yield Item(name="one weight in exchange", size=0 if self.setup.offload else largest)


def _denoised(denoising: Denoising) -> tuple[Item, ...]:
    return (
        Item(name="prefix keys and values", size=denoising.prefix.kept),
        Item(name="one guided evaluation", size=denoising.evaluation.peak),
    )


def _units(parts: Components) -> list[nn.Module]:
    return list(parts.transformer.transformer_blocks)


def _largest(modules: Iterable[nn.Module]) -> int:
    """Parameters of the largest of some modules."""
    return max((count(module.parameters()) for module in modules), default=0)


def _latent_channels(parts: Components) -> int:
    """Channels of a latent token, as the transformer takes it."""
    return int(parts.transformer.config.in_channels)


def _teachers(setup: Setup, parts: Components, work: Workload) -> list[Item]:
    """Room for one teacher on the device, and all of them on the host."""
    if work.teachers is None or not work.teachers.copies:
        return []
    values = sum(p.numel() for n, p in parts.transformer.named_parameters() if ".lora_" not in n)
    a_value, shards = FROZEN_DTYPES[setup.generator.frozen_dtype].itemsize, setup.shards if work.teachers.sharded else 1
    size = math.ceil(values * a_value / shards)
    return [Item(name="teacher in turn", size=size, host=size * work.teachers.copies)]


def _local_rewards(profile: Profile) -> list[Item]:
    """Vision-language rewards that run in the process, one item a checkpoint."""
    found = {}
    for reward in {**profile.rewards, **profile.monitors}.values():
        while isinstance(reward, CategoryReward):
            reward = reward.reward
        if isinstance(reward, PlannedVLMReward):
            found[reward.path] = Item(name=f"reward model {reward.path}", size=reward.planned_bytes)
    return list(found.values())
