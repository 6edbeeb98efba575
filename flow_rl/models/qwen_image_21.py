"""Qwen-Image 2.1: one single-stream transformer for text-to-image and editing.

Text and source-image tokens are modulated at t = 0 (`causal_condition`), so their keys and values depend on
neither the timestep nor the target: the "prefix". It is computed once a distinct prompt and shared by every
sample of a group, with or without gradient.

Shapes: N samples, P distinct prompts, L text tokens, D text channels, S latent tokens, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flow_rl.models.image_model import BlockForward, Conditioning
from flow_rl.models.images import to_rgba, to_uint8
from flow_rl.models.memory import WeightDtypes
from flow_rl.models.on_device import a_sample, mask_on, samples_of
from flow_rl.models.pipeline_model import PipelineModel, check_multiple
from flow_rl.models.qwen_image_21_compiled import cached_only
from flow_rl.models.qwen_image_21_flops import forward_flops
from flow_rl.models.qwen_image_21_prefix import BatchCache, Prefix
from flow_rl.models.vae import decode_frame, encode_frame, in_chunks

if TYPE_CHECKING:  # diffusers' pipelines take seconds to import, and to plan a run nothing of them is needed
    from diffusers import QwenImage21Pipeline
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

#: how many latent tokens one image slot of the vision-language encoder stands for
TOKENS_A_SLOT = 4
#: height and width in pixels of what diffusers' pipeline makes by default; the released model's own size is 2048 x 2048
DEFAULT_SIZE = (1024, 1024)


class QwenImage21(PipelineModel):
    """The Qwen-Image 2.1 family, real or tiny, around the components of diffusers' own pipeline.

    Args:
        pipeline: holds scheduler, VAE, text encoder, processor and transformer.
        image_size: default height and width in pixels.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out",
    )  # fmt: skip

    def __init__(self, pipeline: QwenImage21Pipeline, *, image_size: tuple[int, int] = DEFAULT_SIZE) -> None:
        super().__init__(pipeline, image_size=image_size)
        # The pipeline class assumes 16x; the VAE knows its own compression.
        pipeline.vae_scale_factor = self.vae.config.scale_factor_spatial

    # ----------------------------------------------------------------- geometry and schedule

    @classmethod
    def token_grid(cls, vae_config: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """See `PipelineModel.token_grid`: a side is a multiple of two tokens, as a slot is a 2 x 2 group."""
        compression = vae_config["scale_factor_spatial"]
        check_multiple(size, 2 * compression)
        return size[0] // compression, size[1] // compression

    @classmethod
    def sample_sigmas(cls, index: Mapping[str, Any]) -> list[float] | None:
        """See `PipelineModel.sample_sigmas`: few-step variants prescribe theirs, and diffusers' pipeline follows."""
        return index.get("sample_sigmas")

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """See `ImageModel.latent_shape`."""
        return math.prod(self.grid((height, width))), self.vae.config.z_dim

    # ----------------------------------------------------------------- conditioning

    def encode(
        self, prompts: Sequence[str], images: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Conditioning:
        """See `ImageModel.encode`. Gradients reach the text encoder if its weights require them."""
        self.check_prompts(prompts)
        embeds, slots = self._embed_text(prompts, images)
        return Conditioning(
            embeds=embeds,
            image_slots=slots,
            target_grid=self.grid(size),
            source_grid=None if images is None else self.grid((images.shape[2], images.shape[3])),
            source_latents=None if images is None else self.encode_images(images),
            rows=torch.arange(len(prompts)),
        )

    def _embed_text(
        self, prompts: Sequence[str], images: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        pipe, device = self._pipeline, self.device
        # Qwen has no start token: the encoder needs at least a blank to read.
        template = pipe.prompt_template_t2i if images is None else pipe.prompt_template_ti2i
        inputs: dict[str, object] = {"text": [template.format(p or " ") for p in prompts]}
        if images is not None:
            inputs["images"] = [Image.fromarray(image) for image in to_uint8(images)]
        batch = pipe.processor(**inputs, padding=True, padding_side="left", return_tensors="pt")
        ids, starts = batch["input_ids"], (batch["attention_mask"] == 0).sum(dim=1)
        hidden = self._last_hidden_state(dict(batch.to(device)))
        # The transformer never reads the system message. Counts and slots stay on the host, which needs them.
        starts = (starts + pipe._drop_idx).tolist()
        embeds = tuple(states[start:] for states, start in zip(hidden, starts, strict=True))
        slots = tuple((row == pipe._img_token_id)[start:] for row, start in zip(ids, starts, strict=True))
        return embeds, slots

    def _last_hidden_state(self, inputs: dict[str, Tensor]) -> Tensor:
        """Output of the last decoder layer before the final norm: what the transformer was trained on."""
        captured: list[Tensor] = []
        norm = self.text_encoder.model.language_model.norm
        handle = norm.register_forward_pre_hook(lambda _module, args: captured.append(args[0]))
        try:
            self.text_encoder.model(**inputs, use_cache=False)
        finally:
            handle.remove()
        return captured[-1]

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `ImageModel.encode_images`. Opaque images: the VAE's fourth channel is alpha."""
        pixels = to_rgba(images).to(self.vae.dtype)
        modes = in_chunks(partial(encode_frame, self.vae), pixels, (images.shape[2], images.shape[3]))
        latents = (modes - self.latents_mean) / self.latents_std
        return latents.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """See `ImageModel.decode`."""
        spatial = latents.transpose(1, 2).unflatten(2, (1, *self.grid(size)))
        scaled = (spatial * self.latents_std + self.latents_mean).to(self.vae.dtype)
        images = in_chunks(partial(decode_frame, self.vae), scaled, size or self.image_size)[:, :3, 0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    # ----------------------------------------------------------------- the denoising evaluation

    @torch.no_grad()
    def cache_prefix(self, conditioning: Conditioning) -> Conditioning:
        """See `ImageModel.cache_prefix`: keys and values of every distinct prompt."""
        return replace(conditioning, prefix=self._extract(conditioning, conditioning.rows.unique().tolist()))

    def velocity(self, latents: Tensor, sigma: float | Tensor, conditioning: Conditioning) -> Tensor:
        """See `ImageModel.velocity`. One forward for the prefixes and one for the targets, or a single joint one."""
        if latents.shape[0] != len(conditioning):
            raise ValueError(f"{latents.shape[0]} latents for a conditioning of {len(conditioning)} samples.")
        sigmas = a_sample(sigma, latents)
        rows = conditioning.rows.tolist()
        if conditioning.prefix is not None:
            return self._target_velocity(latents, sigmas, conditioning, rows, conditioning.prefix)
        prompts = sorted(set(rows))
        alone = len(prompts) == len(rows) and not (self.uniform_forwards or self.compiled)
        if alone and len({conditioning.embeds[row].shape[0] for row in rows}) == 1:
            # Nothing to share and nothing to pad: prefix and target together.
            return self._forward(latents, sigmas, conditioning, rows)
        return self._target_velocity(latents, sigmas, conditioning, rows, self._extract(conditioning, prompts))

    def _extract(self, conditioning: Conditioning, prompts: list[int]) -> Prefix:
        """Prefix keys and values of prompts, in one forward. The target tokens fed along can't reach them."""
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        cache = QwenImage21KVCache(len(self.transformer.transformer_blocks))
        smallest = replace(conditioning, target_grid=(2, 2))
        blank = torch.zeros(len(prompts), TOKENS_A_SLOT, self.transformer.config.in_channels, device=self.device)
        self._forward(blank, blank.new_zeros(len(prompts)), smallest, prompts, cache, "extract")
        text = [int((~conditioning.image_slots[p]).sum()) for p in prompts]  # on the CPU: no wait
        source = conditioning.source_grid or (0, 0)
        return Prefix(
            cache=cache,
            prompts=tuple(prompts),
            lengths=tuple(count + math.prod(source) for count in text),
            frames=tuple(count + max(source) for count in text),
            frequencies=self.transformer.pos_embed.freqs[0],
        )

    def _target_velocity(
        self, latents: Tensor, sigmas: Tensor, conditioning: Conditioning, rows: list[int], prefix: Prefix
    ) -> Tensor:
        """Velocity of samples whose prefixes are known."""
        batch = prefix.batch(rows)
        if batch.valid is None:
            return self._forward(latents, sigmas, conditioning, rows, batch, "cached")
        # Padded prefixes: to the transformer they are so many tokens of text, whatever is in them.
        channels = self.transformer.config.context_in_dim
        text = torch.zeros(*batch.valid.shape, channels, dtype=self.transformer.dtype, device=latents.device)
        slots = torch.zeros(batch.valid.shape[1], dtype=torch.bool)
        return self._transform(
            latents, sigmas, text, slots, [(1, *conditioning.target_grid)], batch, "cached", batch.valid
        )

    def _forward(
        self,
        latents: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        rows: list[int],
        cache: QwenImage21KVCache | BatchCache | None = None,
        mode: str | None = None,
    ) -> Tensor:
        """Samples with their own text, padded on the right to the longest, which only the extraction may be."""
        hidden, shapes = latents, [(1, *conditioning.target_grid)]
        if conditioning.source_latents is not None and conditioning.source_grid is not None:
            hidden = torch.cat([samples_of(conditioning.source_latents, rows).to(hidden.dtype), hidden], dim=1)
            shapes.insert(0, (1, *conditioning.source_grid))
        text = pad_sequence([conditioning.embeds[row] for row in rows], batch_first=True)
        slots = max((conditioning.image_slots[row] for row in rows), key=len)
        return self._transform(hidden, sigmas, text, slots, shapes, cache, mode, None)[:, -latents.shape[1] :]

    def _transform(
        self,
        hidden: Tensor,
        sigmas: Tensor,
        text: Tensor,
        slots: Tensor,
        shapes: list[tuple[int, int, int]],
        cache: QwenImage21KVCache | BatchCache | None,
        mode: str | None,
        valid: Tensor | None,
    ) -> Tensor:
        dtype, samples = self.transformer.dtype, hidden.shape[0]
        target_slots = math.prod(shapes[-1]) // TOKENS_A_SLOT
        output: Tensor = self.transformer(
            hidden_states=hidden.to(dtype),
            encoder_hidden_states=text.to(dtype),
            encoder_hidden_states_mask=valid,
            timestep=sigmas,
            img_shapes=[shapes] * samples,
            img_mask=mask_on(hidden.device, slots.tolist() + target_slots * [True]).expand(samples, -1),
            kv_cache=cache,
            kv_cache_mode=mode,
            return_dict=False,
        )[0]
        if self.on_flops is not None:
            target = math.prod(shapes[-1])
            source = hidden.shape[1] - target
            flops = forward_flops(
                self.transformer, samples=samples, slots=slots.tolist(), source=source, target=target, mode=mode
            )
            # An extraction's output is thrown away: gradients come back through the keys it left.
            entry = output if cache is None or isinstance(cache, BatchCache) else cache.layer_caches[-1].k
            self.count_flops(flops, entry)
        return output.float()

    def compiled_forward(self, eager: BlockForward, compiled: BlockForward) -> BlockForward:
        """See `ImageModel.compiled_forward`: only blocks that read the prefix are compiled."""
        return cached_only(eager, compiled)

    @classmethod
    def load_pipeline(cls, path: str | Path, dtypes: WeightDtypes, **parts: nn.Module) -> QwenImage21Pipeline:
        """See `PipelineModel.load_pipeline`."""
        from diffusers import QwenImage21Pipeline

        return QwenImage21Pipeline.from_pretrained(str(path), dtype=dtypes.by_component(), **parts)
