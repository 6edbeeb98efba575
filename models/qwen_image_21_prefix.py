"""The timestep-independent prefix of Qwen-Image 2.1: keys and values of prompts, laid out for a batch of samples.

Prompts differ in length, and the target's rotary position on the frame axis is the length of what precedes it. Two
facts put samples of any lengths into one forward, with the result each would have alone:

- text is causal, so prompts padded on the right are extracted together and their own tokens never see the padding;
- rotary attention depends on differences of positions only, so a prompt padded on the left to length M behaves as
  before if its keys are turned on by the same offset on the frame axis (height and width do not move). The padding
  is masked out.

Shapes: N samples, P distinct prompts, M longest prefix, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache


@dataclass(frozen=True, kw_only=True)
class BatchCache:
    """What a forward in "cached" mode needs.

    Attributes:
        cache: keys and values (N, M, H, D) of every layer.
        valid: bool (N, M), False at padding; None where all prefixes have the same length.
    """

    cache: QwenImage21KVCache
    valid: Tensor | None


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

        Without gradient the last answer is kept: a rollout asks the same every step.
        """
        key = tuple(rows)
        if key in self._made:
            return self._made[key]
        position = {prompt: i for i, prompt in enumerate(self.prompts)}
        index = [position[row] for row in rows]
        lengths = [self.lengths[i] for i in index]
        made = self._same_length(index, lengths[0]) if len(set(lengths)) == 1 else self._padded(index)
        if not torch.is_grad_enabled():
            self._made.clear()
            self._made[key] = made
        return made

    def _same_length(self, index: list[int], length: int) -> BatchCache:
        cache = type(self.cache)(len(self.cache.layer_caches))
        for source, target in zip(self.cache.layer_caches, cache.layer_caches, strict=True):
            which = torch.tensor(index, device=source.k.device)
            target.store(source.k[which, :length], source.v[which, :length])
        return BatchCache(cache=cache, valid=None)

    def _padded(self, index: list[int]) -> BatchCache:
        device = self.cache.layer_caches[0].k.device
        lengths = torch.tensor([self.lengths[i] for i in index], device=device)
        longest = int(lengths.max())
        # The layout shown to the transformer is `longest` tokens of text, so the target's frame is `longest`.
        offsets = longest - torch.tensor([self.frames[i] for i in index], device=device)
        turn = self.frequencies.to(device)[offsets][:, None, None]
        place = torch.arange(longest, device=device) - (longest - lengths)[:, None]
        which = torch.tensor(index, device=device)[:, None]
        cache = type(self.cache)(len(self.cache.layer_caches))
        for source, target in zip(self.cache.layer_caches, cache.layer_caches, strict=True):
            keys, values = source.k[which, place.clamp(min=0)], source.v[which, place.clamp(min=0)]
            target.store(_turned(keys, turn), values)
        return BatchCache(cache=cache, valid=place >= 0)


def _turned(keys: Tensor, turn: Tensor) -> Tensor:
    """Keys (N, M, H, D) moved on along the frame axis by the rotation (N, 1, 1, frame channels / 2)."""
    channels = 2 * turn.shape[-1]
    frame = torch.view_as_complex(keys[..., :channels].float().unflatten(-1, (-1, 2)).contiguous())
    moved = torch.view_as_real(frame * turn).flatten(-2).to(keys.dtype)
    return torch.cat([moved, keys[..., channels:]], dim=-1)
