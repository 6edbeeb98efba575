"""Builders of toy-sized Qwen-Image v1 pipelines: the real classes, a millionth of the weights.

The VAE compresses 8x and a token is 2 x 2 latent pixels, so a 32 x 32 image is 2 x 2 = 4 latent tokens. The vision
encoder's patch of 8 pixels with a 2 x 2 merge makes four image slots of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLProcessor,
)

from flow_rl.models.tiny.qwen_image_21 import build_processor, build_tokenizer

LATENT_CHANNELS = 4


def build_text_encoder_v1(
    tokenizer: Qwen2TokenizerFast, *, hidden_size: int = 64
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of two layers, randomly initialised from torch's global generator."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer), "hidden_size": hidden_size, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32, "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build_vae_v1() -> AutoencoderKLQwenImage:
    """An 8x autoencoder; its latent statistics are made up, so that a test sees whether they are applied."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.5, 0.7, 1.2],
    ).eval()


def build_transformer_v1(
    *, text_channels: int = 64, num_layers: int = 2, num_heads: int = 2, head_dim: int = 32
) -> QwenImageTransformer2DModel:
    """The denoiser; the defaults make about 0.4 million parameters."""
    return QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=num_layers,
        attention_head_dim=head_dim,
        num_attention_heads=num_heads,
        joint_attention_dim=text_channels,
        axes_dims_rope=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
    ).eval()


def build_scheduler_v1() -> FlowMatchEulerDiscreteScheduler:
    """Shifted by resolution and stretched to end at 0.02, as the released checkpoints' schedule is."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def build_pipeline_v1(texts: Iterable[str], *, kind: str = "t2i", seed: int = 0) -> DiffusionPipeline:
    """Every component, randomly initialised.

    Args:
        texts: the tokenizer is trained on these.
        kind: `t2i`, `edit` or `edit_plus`.
        seed: of the weights; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(texts)
        parts = {
            "scheduler": build_scheduler_v1(),
            "vae": build_vae_v1(),
            "text_encoder": build_text_encoder_v1(tokenizer),
            "tokenizer": tokenizer,
            "transformer": build_transformer_v1(),
        }
    if kind == "t2i":
        return QwenImagePipeline(**parts)
    source = build_processor(tokenizer)
    processor = Qwen2VLProcessor(
        image_processor=source.image_processor,
        tokenizer=tokenizer,
        video_processor=source.video_processor,
        chat_template=source.chat_template,
    )
    return {"edit": QwenImageEditPipeline, "edit_plus": QwenImageEditPlusPipeline}[kind](**parts, processor=processor)
