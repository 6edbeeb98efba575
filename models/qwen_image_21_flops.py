"""Operations of one forward of Qwen-Image 2.1's transformer."""

from __future__ import annotations

from torch import nn

from models.flops import Flops, attention, projections


def forward_flops(
    transformer: nn.Module, *, samples: int, text: int, prefix: int, images: int, target: int, cached: bool
) -> Flops:
    """Operations of one forward.

    Args:
        transformer: a `QwenImage21Transformer2DModel`, with or without an adapter.
        samples: in the batch.
        text: tokens of the text encoder's sequence, image slots included.
        prefix: tokens before the target in the joint sequence: text without slots, and source image.
        images: latent tokens handed in, source and target.
        target: latent tokens of the target.
        cached: whether the prefix's keys and values are known, so that the target's tokens alone are computed.
    """
    computed = target if cached else prefix + target
    # The prefix is counted as one block: a causal mask is computed and thrown away, as attention with a mask does.
    pairs = target * (prefix + target) + (0 if cached else prefix * prefix)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    total = attention(width, len(transformer.transformer_blocks), samples * pairs)
    total += projections(transformer.transformer_blocks, samples * computed)
    total += projections(transformer.proj_out, samples * computed)
    total += projections(transformer.img_in, samples * images)
    total += projections(transformer.txt_in, samples * text)
    for module in (transformer.time_text_embed, transformer.modulation, transformer.norm_out):
        total += projections(module, samples + 1)  # once a sample, and once for t = 0
    return total
