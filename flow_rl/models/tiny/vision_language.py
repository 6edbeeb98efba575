"""A tiny Qwen3-VL that can see: the real classes, two million weights, for 32 x 32 pictures.

The image generator's text encoder (`flow_rl.models.tiny.qwen_image_21`) has patches of 8 pixels, the generator's own
grid. A scorer has to tell glasses, beards and letters apart, whose strokes are one to three pixels wide: patches of 4
pixels, merged 2 x 2, give 64 patches and 16 image tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import Qwen2TokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from flow_rl.models.tiny.qwen_image_21 import build_processor, train_bpe

PATCH_SIZE, MERGE_SIZE, IMAGE_SIZE = 4, 2, 32
#: far more than the demo's few hundred words need: the BPE stops when every word is one token
_VOCABULARY = 4096


def build_vlm_tokenizer(texts: Iterable[str]) -> Qwen2TokenizerFast:
    """A BPE in which every word of the texts is one token, with the blank before it.

    Args:
        texts: everything that the model reads and writes, capital letters included.
    """
    words = sorted({word for text in texts for word in text.split()})
    # Each word alone as often as after a blank: no merge is ever too rare to be made.
    return train_bpe([f"{word} {word}" for word in words] * 2, vocab_size=_VOCABULARY)


def build_vlm(
    tokenizer: Qwen2TokenizerFast, *, hidden_size: int = 160, num_layers: int = 4, seed: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """Model with random weights, and its processor.

    Args:
        tokenizer: see `build_vlm_tokenizer`.
        hidden_size: of the language model.
        num_layers: of the language model.
        seed: of the weights; torch's global generator is left as it was.
    """
    config = Qwen3VLConfig(
        text_config=_text_config(tokenizer, hidden_size, num_layers),
        vision_config=_vision_config(hidden_size),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config).eval()
    for merger in model.model.visual.deepstack_merger_list:
        # Intermediate features join the language model once they help: until then they would only be noise.
        torch.nn.init.zeros_(merger.linear_fc2.weight)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, build_processor(tokenizer, patch_size=PATCH_SIZE)


def _text_config(tokenizer: Qwen2TokenizerFast, hidden_size: int, num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,  # 0.02 is for models ten times as wide
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
        },
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def _vision_config(out_hidden_size: int) -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_heads": 3,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "out_hidden_size": out_hidden_size,
        "num_position_embeddings": (IMAGE_SIZE // PATCH_SIZE) ** 2,
        "deepstack_visual_indexes": [0],  # texture, for judging damage
        "initializer_range": 0.05,
    }
