"""Noise that depends on its key alone: a sample's is the same on any rank, in any batch, after any resume.

A draw is keyed by (seed, step, sample id, member, stream, index). Nothing is carried from one draw to the
next, so there is no generator state to save, and neither the micro-batch size nor the number of ranks can
change a result.

Normals are counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key
is hashed to 128 bits, each pair of numbers is a mix of those bits and its position, and Box-Muller makes it
normal. Seeding a `torch.Generator` with the hash instead would not do: its CPU engine uses the low 32 bits
of a seed, so among some 77,000 keys two would share their noise with probability 1/2.

Shapes: N samples, ... the shape of one sample, P = ceil(numel / 2) pairs of normals a sample.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """What a draw is for: two purposes never share their numbers.

    The values are part of what a seed means: append, never renumber.
    """

    INITIAL = 0
    """The noise a rollout starts from (x at sigma = 1)."""
    STEP = 1
    """The fresh noise of a stochastic denoising step; `index` is the step."""
    WINDOW = 2
    """Which steps of an iteration are stochastic."""
    TIMESTEP = 3
    """Which noise level a training row is put at."""
    FORWARD = 4
    """The noise that brings a clean latent to that level."""
    DATA = 5
    """Order and choice of data."""
    DROPOUT = 6
    """Which captions are dropped for guidance."""
    EVALUATION = 7
    """The fixed noise of validation and test images."""
    STATE = 8
    """Which states of a rollout are distilled."""


def keyed_noise(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    sample_id: int,
    member: int,
    stream: Stream,
    index: int = 0,
) -> Tensor:
    """Draw the standard normal noise of one sample.

    Args:
        shape: shape of one sample.
        seed: the run's seed.
        step: the training iteration.
        sample_id: stable id of the prompt or edit.
        member: position in the sample's group; -1 by convention for noise that the group shares.
        stream: what the noise is for.
        index: which of several draws under one key, such as the denoising step.

    Returns:
        float32 on the CPU, of the given shape.
    """
    return batch_noise(shape, seed=seed, step=step, ids=[sample_id], members=[member], stream=stream, index=index)[0]


def batch_noise(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    ids: Sequence[int],
    members: Sequence[int],
    stream: Stream,
    index: int = 0,
) -> Tensor:
    """Draw the noise of several samples; row n is `keyed_noise` of `ids[n]`, `members[n]`.

    Args:
        shape: shape of one sample.
        seed: the run's seed.
        step: the training iteration.
        ids: stable id of each sample's prompt or edit, N of them.
        members: position of each sample in its group, N of them.
        stream: what the noise is for.
        index: which of several draws under one key, such as the denoising step.

    Returns:
        float32 on the CPU, shape (N, ...).

    Raises:
        ValueError: where `ids` and `members` differ in length, or a key is not a 64-bit integer.
    """
    if len(ids) != len(members):
        raise ValueError(f"ids and members name one sample each: received {len(ids)} ids, {len(members)} members.")
    shape = tuple(shape)
    size = math.prod(shape)
    keys = [_hash(seed, step, sample_id, member, stream, index) for sample_id, member in zip(ids, members, strict=True)]
    return _normals(keys, size).view(len(ids), *shape)


def keyed_generator(
    *, seed: int, step: int, stream: Stream, sample_id: int = 0, member: int = 0, index: int = 0
) -> torch.Generator:
    """Make a CPU generator seeded by the key, for `torch.randperm` and other choices made once in a while.

    The engine keeps 32 bits of its seed: for noise a sample use `keyed_noise`.

    Args:
        seed: the run's seed.
        step: the training iteration.
        stream: what the choice is for.
        sample_id: stable id of the sample it concerns, if any.
        member: position in the sample's group, if any.
        index: which of several draws under one key.

    Returns:
        A fresh generator.
    """
    low, _ = _hash(seed, step, sample_id, member, stream, index)
    return torch.Generator().manual_seed(low & (2**63 - 1))


def _hash(*key: int) -> tuple[int, int]:
    """Mix integers to two independent 64-bit words; the same on every platform and Python."""
    try:
        packed = struct.pack(f"<{len(key)}q", *(int(part) for part in key))
    except struct.error as error:
        raise ValueError(f"Each part of a noise key must fit a signed 64-bit integer; received {key}.") from error
    return struct.unpack("<2Q", hashlib.blake2b(packed, digest_size=16).digest())


def _normals(keys: Sequence[tuple[int, int]], size: int) -> Tensor:
    """Standard normals, float32, shape (N, size)."""
    low, high = (torch.tensor([_signed(key[word]) for key in keys], dtype=torch.int64).view(-1, 1) for word in (0, 1))
    counter = torch.arange(1, (size + 1) // 2 + 1, dtype=torch.int64) * _signed(_GOLDEN)
    # Two rounds, each with a word of its own: two keys overlap only where both words agree.
    bits = _mix(_mix(counter + low) ^ high)
    scale = 2.0**-32
    # Half a step off the grid keeps the logarithm's argument inside (0, 1).
    radius = (((bits & 0xFFFFFFFF).double() + 0.5) * scale).log_().mul_(-2).sqrt_()
    angle = (_shift(bits, 32).double() + 0.5) * (scale * 2 * math.pi)
    normals = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return normals[:, :size].float()


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) on int64, whose products wrap."""
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, places: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - 2**64 if word >= 2**63 else word
