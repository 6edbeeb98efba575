"""Builders of toy-sized Qwen-Image 2.1 components: the real classes, a millionth of the weights.

The toy VAE compresses 8x, so a 32 x 32 image is 4 x 4 = 16 latent tokens and 4 image slots of 16 x 16 pixels;
the vision encoder's patch of 8 pixels with a 2 x 2 merge matches that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
LATENT_CHANNELS = 32

#: system / user / assistant turns the way Qwen writes them; content is text or a list of parts
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], *, vocab_size: int = 768) -> Qwen2TokenizerFast:
    """A byte-level BPE in Qwen's layout, trained on the lower-cased texts.

    Capitals are thus never merged: a word to be drawn is read letter by letter, seen before or not.

    Args:
        texts: what the model will read.
        vocab_size: at most so many tokens, special ones included.
    """
    template = "system\nComprehend and analyze the provided prompt. user\n assistant\n picture"
    return train_bpe([template.lower(), template] + [t.lower() for t in texts], vocab_size=vocab_size)


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Qwen2TokenizerFast:
    """A byte-level BPE in Qwen's layout, trained on the texts as they are.

    Args:
        texts: what the model will read.
        vocab_size: at most so many tokens, special ones included.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainer)
    state = json.loads(backend.to_str())["model"]
    return Qwen2TokenizerFast(
        vocab=state["vocab"],
        merges=[tuple(m) for m in state["merges"]],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def build_processor(tokenizer: Qwen2TokenizerFast, *, patch_size: int = 8) -> Qwen3VLProcessor:
    """Processor for 32 x 32 pixel images: image slots of 2 x 2 patches, so four slots by default."""
    vision = {"patch_size": patch_size, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **vision, **mean),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=size, **vision, **mean),
        chat_template=CHAT_TEMPLATE,
    )


def build_text_encoder(
    tokenizer: Qwen2TokenizerFast, *, hidden_size: int = 128, num_layers: int = 3
) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of about a million parameters, randomly initialised from torch's global generator."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
        },
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def build_vae() -> AutoencoderKLQwenImage21:
    """An 8x RGBA autoencoder of about a million parameters; latent statistics start as mean 0, deviation 1."""
    return AutoencoderKLQwenImage21(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=8,
    ).eval()


def build_transformer(
    *, text_channels: int = 128, num_layers: int = 6, num_heads: int = 6, head_dim: int = 32
) -> QwenImage21Transformer2DModel:
    """The denoiser; the defaults make about 3.3 million parameters."""
    quarter = head_dim // 4
    transformer = QwenImage21Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=num_layers,
        attention_head_dim=head_dim,
        num_attention_heads=num_heads,
        context_in_dim=text_channels,
        axes_dims_rope=(head_dim - 6 * (quarter // 2), 3 * (quarter // 2), 3 * (quarter // 2)),
    )
    # The gates are tanh of this projection: from zero every block would start as the identity and stay there longer.
    torch.nn.init.normal_(transformer.modulation[1].weight, std=0.02)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer.eval()


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified-flow sigmas with a fixed shift of 3, whatever the resolution."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)


def build_pipeline(texts: Iterable[str], *, seed: int = 0) -> QwenImage21Pipeline:
    """Every component, randomly initialised.

    Args:
        texts: the tokenizer is trained on these.
        seed: of the weights; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(texts)
        return QwenImage21Pipeline(
            scheduler=build_scheduler(),
            vae=build_vae(),
            text_encoder=build_text_encoder(tokenizer),
            processor=build_processor(tokenizer),
            transformer=build_transformer(),
        )
