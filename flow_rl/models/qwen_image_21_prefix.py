"""The timestep-independent prefix of Qwen-Image 2.1: keys and values of prompts, laid out for a batch of samples.

Prompts differ in length, and the target's rotary position on the frame axis is the length of what precedes it. Two
facts put samples of any lengths into one forward, with the result each would have alone:

- text is causal, so prompts padded on the right are extracted together and their own tokens never see the padding;
- rotary attention depends on differences of positions only, so a prompt padded on the left to length M behaves as
  before if its keys are turned on by the same offset on the frame axis (height and width do not move). The padding
  is masked out.

Only the keys and values of the P prompts are kept. Those of the N samples are laid out layer by layer, when the
transformer asks for them, and a batch of one prompt's samples reads them through a view.

Shapes: N samples, P distinct prompts, M longest prefix, H heads, D channels of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache, QwenImage21KVLayerCache


class Layout(ABC):
    """Where each sample of a batch finds its keys and values among those of the prompts.

    Attributes:
        valid: bool (N, M), False at padding; None where all prefixes have the same length.
    """

    valid: Tensor | None = None

    @abstractmethod
    def values(self, cached: Tensor) -> Tensor:
        """Values (N, M, H, D) of the samples from those of the prompts, (P, longest, H, D)."""

    def keys(self, cached: Tensor) -> Tensor:
        """The same for keys."""
        return self.values(cached)


@dataclass(frozen=True, kw_only=True)
class OnePrompt(Layout):
    """All samples belong to one prompt: no copies.

    Attributes:
        index: position of the prompt.
        length: tokens of its prefix.
        samples: N.
    """

    index: int
    length: int
    samples: int

    def values(self, cached: Tensor) -> Tensor:
        """See `Layout.values`: a view."""
        row = cached[self.index : self.index + 1, : self.length]
        repeated: Tensor = _Repeated.apply(row, self.samples)
        return repeated


@dataclass(frozen=True, kw_only=True)
class SameLength(Layout):
    """Several prompts whose prefixes are equally long.

    Attributes:
        index: int64 (N,), position of each sample's prompt.
        length: tokens of a prefix.
    """

    index: Tensor
    length: int

    def values(self, cached: Tensor) -> Tensor:
        """See `Layout.values`."""
        return cached[self.index, : self.length]


@dataclass(frozen=True, kw_only=True)
class Padded(Layout):
    """Prompts of different lengths, padded on the left.

    Attributes:
        index: int64 (N, 1), position of each sample's prompt.
        place: int64 (N, M), position of each token in its prompt; any at padding.
        turn: complex (N, 1, 1, frame channels / 2), what moves a prompt's keys on along the frame axis.
        valid: see `Layout`.
    """

    index: Tensor
    place: Tensor
    turn: Tensor
    valid: Tensor

    def values(self, cached: Tensor) -> Tensor:
        """See `Layout.values`."""
        return cached[self.index, self.place]

    def keys(self, cached: Tensor) -> Tensor:
        """See `Layout.keys`."""
        return _turned(self.values(cached), self.turn)


class LayerReader:
    """Reads one layer's cache through a layout, in place of diffusers' `QwenImage21KVLayerCache`."""

    def __init__(self, cached: QwenImage21KVLayerCache, layout: Layout) -> None:
        self.cached = cached
        self.layout = layout

    def get(self) -> tuple[Tensor, Tensor]:
        """Keys and values (N, M, H, D)."""
        return self.layout.keys(self.cached.k), self.layout.values(self.cached.v)

    def laid_out(self) -> QwenImage21KVLayerCache:
        """Keys and values (N, M, H, D) as they are now: nothing but tensors, for a compiled block."""
        laid_out = type(self.cached)()
        laid_out.store(*self.get())
        return laid_out


class BatchCache:
    """What a forward in "cached" mode needs, in place of diffusers' `QwenImage21KVCache`.

    Attributes:
        valid: see `Layout`.
    """

    def __init__(self, cache: QwenImage21KVCache, layout: Layout) -> None:
        self.valid = layout.valid
        self._layers = [LayerReader(cached, layout) for cached in cache.layer_caches]

    def get_layer(self, index: int) -> LayerReader:
        """The cache of a block."""
        return self._layers[index]


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Keys and values of P prompts, padded on the right.

    Attributes:
        cache: (P, longest, H, D) in every layer.
        prompts: which prompt each row belongs to.
        lengths: tokens of each prompt's prefix, text and source image.
        frames: rotary frame position of the target behind each prefix.
        frequencies: complex rotary table of the frame axis, (positions, channels / 2).
    """

    cache: QwenImage21KVCache
    prompts: tuple[int, ...]
    lengths: tuple[int, ...]
    frames: tuple[int, ...]
    frequencies: Tensor
    _made: dict[tuple[int, ...], BatchCache] = field(default_factory=dict)

    def batch(self, rows: Sequence[int]) -> BatchCache:
        """Keys and values for samples of these prompts; gradients add up over the samples of a prompt.

        The last answer is kept: a rollout asks the same every step.
        """
        key = tuple(rows)
        if key not in self._made:
            position = {prompt: i for i, prompt in enumerate(self.prompts)}
            layout = self._layout([position[row] for row in rows])
            self._made.clear()
            self._made[key] = BatchCache(self.cache, layout)
        return self._made[key]

    def _layout(self, index: list[int]) -> Layout:
        lengths = [self.lengths[i] for i in index]
        if len(set(index)) == 1:
            return OnePrompt(index=index[0], length=lengths[0], samples=len(index))
        device = self.cache.layer_caches[0].k.device
        if len(set(lengths)) == 1:
            return SameLength(index=torch.tensor(index, device=device), length=lengths[0])
        longest = max(lengths)
        # The layout shown to the transformer is `longest` tokens of text, so the target's frame is `longest`.
        facts = [(i, longest - self.frames[i], longest - self.lengths[i]) for i in index]
        which, offsets, padding = torch.tensor(facts, device=device).T  # one copy to the device
        place = torch.arange(longest, device=device) - padding[:, None]
        return Padded(
            index=which[:, None],
            place=place.clamp(min=0),
            turn=self.frequencies.to(device)[offsets][:, None, None],
            valid=place >= 0,
        )


class _Repeated(torch.autograd.Function):
    """A row of one sample as N samples without a copy.

    `expand` would do, but its backward rounds differently with N and the shape. This one adds sample after sample, as
    the backward of indexing does on a CPU, and in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, samples: int) -> Tensor:
        return row.expand(samples, *row.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        first, *others = gradient.split(1)
        total = first.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        for other in others:
            total += other
        return total.to(gradient.dtype), None


def _turned(keys: Tensor, turn: Tensor) -> Tensor:
    """Keys (N, M, H, D) moved on along the frame axis by the rotation (N, 1, 1, frame channels / 2)."""
    channels = 2 * turn.shape[-1]
    frame = torch.view_as_complex(keys[..., :channels].float().unflatten(-1, (-1, 2)).contiguous())
    moved = torch.view_as_real(frame * turn).flatten(-2).to(keys.dtype)
    return torch.cat([moved, keys[..., channels:]], dim=-1)
