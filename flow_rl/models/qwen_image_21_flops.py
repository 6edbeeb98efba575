"""Operations of one forward of Qwen-Image 2.1's transformer, and of its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from flow_rl.models.flops import Flops, attention, projections

if TYPE_CHECKING:
    from diffusers import QwenImage21Transformer2DModel


def forward_flops(
    transformer: QwenImage21Transformer2DModel,
    *,
    samples: int,
    slots: Sequence[bool],
    source: int,
    target: int,
    mode: str | None,
) -> Flops:
    """Operations of one forward.

    Args:
        transformer: with or without an adapter.
        samples: in the batch.
        slots: for each token of the text encoder's sequence, whether it stands for a patch of the source image.
        source: latent tokens of the source image; 0 without one.
        target: latent tokens of the target.
        mode: `extract` where only the prefix's keys and values are used, `cached` where they are known and the
            target's tokens alone are computed, None for prefix and target together.
    """
    text = len(slots) - sum(slots)
    prefix = text + source
    computed = target if mode == "cached" else prefix + target
    pairs = target * (prefix + target) + (0 if mode == "cached" else _prefix_pairs(slots, source))
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    blocks = transformer.transformer_blocks
    scores = attention(width, 1, samples * pairs)
    total = projections(blocks, samples * computed)
    for _ in blocks:
        total += scores
    head = projections(transformer.proj_out, samples * computed)
    if mode == "extract":
        # The output is thrown away, and of the last block everything but its keys and values.
        last = blocks[-1]
        unused = scores
        for module in (last.attn.to_q, last.attn.to_out, last.img_mlp):
            unused += projections(module, samples * computed)
        total = replace(total, backward=total.backward - unused.backward)
        head = replace(head, backward=0)
    total += head
    total += projections(transformer.img_in, samples * (source + target), input_gradient=False)
    total += projections(transformer.txt_in, samples * len(slots), input_gradient=False)
    for module in (transformer.time_text_embed, transformer.modulation, transformer.norm_out):
        # once a sample, and once for t = 0
        total += projections(module, samples + 1, input_gradient=False)
    return total


def _prefix_pairs(slots: Sequence[bool], source: int) -> int:
    """(query, key) pairs of the prefix: each run of text or source image attends to itself and all before it."""
    pairs, end = 0, 0
    for is_image, run in groupby(slots):
        length = source if is_image else len(list(run))
        end += length
        pairs += length * end
    return pairs
