"""A generator of the real dimensions with random weights, made on the device: nothing is downloaded, nothing read.

The text encoder is left out: a prompt's embedding is noise, keyed by the prompt.

Shapes: N samples, L text tokens of one prompt, D text channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench
from flow_rl.models import Conditioning, QwenImage21
from flow_rl.models.adapters import LoraSettings, add_lora
from flow_rl.models.loading import config_directory, read_config
from flow_rl.models.qwen_image_21 import TOKENS_A_SLOT
from flow_rl.models.shard_units import ShardUnit

#: tokens of a blank prompt in its template, and where a source image's slots begin
BLANK_TOKENS, SLOTS_BEGIN = 7, 5


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Dimensions of what is measured.

    Attributes:
        card: a model's configs, a directory or a hub id with a card.
        size: side of an image in pixels.
        large: side of a large image.
        samples: images denoised at a time.
        steps: of a long rollout.
        short_steps: of a short one.
        text: tokens of a prompt, template included.
        dtype: of frozen weights.
        micro_batches: pairs a backward that are tried.
    """

    card: str = "Qwen/Qwen-Image-2.1"
    size: int = 512
    large: int = 1024
    samples: int = 16
    steps: int = 40
    short_steps: int = 10
    text: int = 128
    dtype: torch.dtype = torch.bfloat16
    micro_batches: tuple[int, ...] = (1, 2, 4, 8)


REAL = Scale()
TINY = Scale(
    card="demo/base", size=32, large=64, samples=2, steps=4, short_steps=3, text=16, dtype=torch.float32,
    micro_batches=(1, 2),
)  # fmt: skip


def scale_of(bench: Bench) -> Scale:
    """The dimensions of a run."""
    return TINY if bench.tiny else REAL


class RandomQwenImage21(QwenImage21):
    """Qwen-Image 2.1 without a text encoder.

    Args:
        pipeline: its other components.
        image_size: default height and width in pixels.
        text: tokens of a prompt.
    """

    def __init__(self, pipeline: Any, *, image_size: tuple[int, int], text: int) -> None:
        super().__init__(pipeline, image_size=image_size)
        self.text = text

    def encode(
        self, prompts: Sequence[str], images: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Conditioning:
        """See `ImageModel.encode`; noise in place of embeddings."""
        source = None if images is None else self.grid((images.shape[2], images.shape[3]))
        slots = 0 if source is None else source[0] * source[1] // TOKENS_A_SLOT
        pairs = [self._embedding(prompt, slots) for prompt in prompts]
        return Conditioning(
            embeds=tuple(embedding for embedding, _ in pairs),
            image_slots=tuple(mask for _, mask in pairs),
            target_grid=self.grid(size),
            source_grid=source,
            source_latents=None if images is None else self.encode_images(images),
            rows=torch.arange(len(prompts)),
        )

    def _embedding(self, prompt: str, slots: int) -> tuple[Tensor, Tensor]:
        length = (self.text if prompt else BLANK_TOKENS) + slots
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        noise = torch.randn(length, self.transformer.config.context_in_dim, generator=generator)
        mask = torch.zeros(length, dtype=torch.bool)
        mask[SLOTS_BEGIN : SLOTS_BEGIN + slots] = True
        return noise.to(self.device, self.transformer.dtype), mask

    def shard_units(self) -> tuple[ShardUnit, ...]:
        """See `ImageModel.shard_units`: there is no text encoder to shard."""
        return (ShardUnit(self.transformer, tuple(self.transformer.transformer_blocks)),)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, floating-point tensors are made in `dtype` where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_part(card: str, part: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A component by its config, initialised on the device; rotary tables keep their own precision."""
    config = read_config(card, part)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), default_dtype(dtype), device:
        torch.manual_seed(0)
        return getattr(diffusers, config["_class_name"]).from_config(config)


def random_model(
    device: torch.device, scale: Scale, *, dtype: torch.dtype | None = None, size: int | None = None
) -> RandomQwenImage21:
    """Transformer in `dtype` (the scale's, if None), VAE in float32; nothing is trainable yet."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        str(config_directory(scale.card)), subfolder="scheduler"
    )
    pipeline = SimpleNamespace(
        transformer=random_part(scale.card, "transformer", device, dtype or scale.dtype),
        vae=random_part(scale.card, "vae", device, torch.float32),
        text_encoder=nn.Module(),
        scheduler=scheduler,
    )
    side = size or scale.size
    model = RandomQwenImage21(pipeline, image_size=(side, side), text=scale.text)
    model.transformer.requires_grad_(False)
    return model.to(device)


def shared_model(bench: Bench, *, rank: int = 32) -> RandomQwenImage21:
    """The model that checks share, with a LoRA adapter; `flow_rl.models.adapters.use_adapter` passes it over."""

    def make() -> RandomQwenImage21:
        model = random_model(bench.device, scale_of(bench))
        lora = LoraSettings(rank=rank, alpha=2 * rank)
        add_lora(model.transformer, **vars(lora), targets=model.lora_targets)
        return model

    return bench.keep("model", make)
