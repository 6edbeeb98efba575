"""Qwen-Image v1: a dual-stream transformer, one checkpoint for text-to-image and others for editing.

Three pipelines of diffusers are one family here: `QwenImagePipeline` makes images from text, `QwenImageEditPipeline`
and `QwenImageEditPlusPipeline` (the checkpoints from 2509 on) edit one. Text tokens are modulated by the timestep and
attend to the image, so nothing can be cached between denoising steps. The target's rotary positions do not depend on
the text, so prompts of different lengths are padded on the right and the padding is masked out.

Guidance is rescaled in diffusers' pipelines: set `guidance.rescale` (`flow_rl.flow.guidance.guide`).

Shapes: N samples, P distinct prompts, L text tokens, D text channels, S latent tokens, C latent channels (a token is
2 x 2 latent pixels, so C is four times the VAE's channels), H height and W width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flow_rl.models.image_model import Conditioning
from flow_rl.models.images import to_uint8
from flow_rl.models.memory import WeightDtypes
from flow_rl.models.on_device import a_sample, samples_of, valid_tokens
from flow_rl.models.pipeline_model import PipelineModel, check_multiple
from flow_rl.models.vae import decode_frame, encode_frame, in_chunks

if TYPE_CHECKING:  # diffusers' pipelines take seconds to import, and to plan a run nothing of them is needed
    from diffusers import DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline

#: height and width in pixels of what diffusers' pipelines make by default; the released models' own size is 1328 x 1328
DEFAULT_SIZE = (1024, 1024)
#: text tokens that `QwenImagePipeline` keeps of a prompt, behind the template
MAX_TEXT_TOKENS = 512
#: what the text encoder is given of a processor's output
ENCODER_INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
#: how an edit checkpoint from 2509 on introduces its source image
PICTURE = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"


class QwenImage(PipelineModel):
    """The Qwen-Image v1 family, real or tiny, around the components of diffusers' own pipelines.

    A source image is read at the size it is given, by the VAE and (but for `QwenImageEditPlusPipeline`, which shows
    it smaller) by the text encoder. Diffusers first scales sources to about 1024 x 1024 pixels, so give them at
    that size to get what it would give.

    Args:
        pipeline: holds scheduler, VAE, text encoder, tokenizer (for edits a processor) and transformer.
        image_size: default height and width in pixels.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip

    def __init__(
        self,
        pipeline: QwenImagePipeline | QwenImageEditPipeline | QwenImageEditPlusPipeline,
        *,
        image_size: tuple[int, int] = DEFAULT_SIZE,
    ) -> None:
        super().__init__(pipeline, image_size=image_size)

    # ----------------------------------------------------------------- geometry

    @classmethod
    def token_grid(cls, vae_config: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """See `PipelineModel.token_grid`: a token is 2 x 2 latent pixels."""
        side = 2 * 2 ** len(vae_config["temperal_downsample"])
        check_multiple(size, side)
        return size[0] // side, size[1] // side

    @classmethod
    def prompt_limit(cls, pipeline: str) -> int | None:
        """See `PipelineModel.prompt_limit`: text-to-image keeps what diffusers keeps, editing everything."""
        return MAX_TEXT_TOKENS if pipeline == "QwenImagePipeline" else None

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """See `ImageModel.latent_shape`."""
        return math.prod(self.grid((height, width))), 4 * self.vae.config.z_dim

    # ----------------------------------------------------------------- conditioning

    @property
    def edits(self) -> bool:
        """Whether the checkpoint edits a source image; the others make images from text alone."""
        from diffusers import QwenImagePipeline

        return not isinstance(self._pipeline, QwenImagePipeline)

    def encode(
        self, prompts: Sequence[str], images: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Conditioning:
        """See `ImageModel.encode`.

        Raises:
            ValueError: source images for a text-to-image checkpoint, or none for one that edits; a prompt that is too
                long.
        """
        self.check_prompts(prompts)
        if self.edits != (images is not None):
            name, wanted = type(self._pipeline).__name__, "a source image" if self.edits else "no source image"
            other = "Qwen-Image" if self.edits else "Qwen-Image-Edit-2509"
            raise ValueError(
                f"This checkpoint is a {name}, which takes {wanted} with each prompt. Set model.model_path to {other}."
            )
        inputs = self._tokens(prompts) if images is None else self._tokens_and_pixels(prompts, images)
        embeds, slots = self._embed(inputs)
        return Conditioning(
            embeds=embeds,
            image_slots=slots,
            target_grid=self.grid(size),
            source_grid=None if images is None else self.grid((images.shape[2], images.shape[3])),
            source_latents=None if images is None else self.encode_images(images),
            rows=torch.arange(len(prompts)),
        )

    def _tokens(self, prompts: Sequence[str]) -> Any:
        pipe = self._pipeline
        texts = [pipe.prompt_template_encode.format(prompt or " ") for prompt in prompts]
        inputs = pipe.tokenizer(texts, padding=True, return_tensors="pt")
        # Diffusers cuts there without a word. A tokenizer that splits the system message finely leaves less room.
        room = MAX_TEXT_TOKENS + pipe.prompt_template_encode_start_idx
        if inputs["input_ids"].shape[1] > room:
            longest = int(inputs["attention_mask"].sum(dim=1).argmax())
            raise ValueError(
                f"The prompt '{prompts[longest]:.60}...' and its template have {inputs['input_ids'].shape[1]} tokens, "
                f"and the generator reads at most {room}. Shorten it."
            )
        return inputs

    def _tokens_and_pixels(self, prompts: Sequence[str], images: Tensor) -> Any:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

        pipe = self._pipeline
        pictures, lead = [Image.fromarray(image) for image in to_uint8(images)], ""
        if isinstance(pipe, edit_plus.QwenImageEditPlusPipeline):
            lead, ratio = PICTURE, images.shape[3] / images.shape[2]
            width, height = edit_plus.calculate_dimensions(edit_plus.CONDITION_IMAGE_SIZE, ratio)
            pictures = [pipe.image_processor.resize(picture, height, width) for picture in pictures]
        texts = [pipe.prompt_template_encode.format(lead + (prompt or " ")) for prompt in prompts]
        return pipe.processor(text=texts, images=pictures, padding=True, return_tensors="pt")

    def _embed(self, inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Last hidden states of each prompt's own tokens behind the template, and which stand for the source."""
        pipe, ids = self._pipeline, inputs["input_ids"]
        # Where each prompt's tokens are is known on the host, so the device isn't asked.
        spans = [_span(mask) for mask in inputs["attention_mask"].tolist()]
        # These alone, as diffusers passes them: token types that a processor adds would move the rotary positions.
        given = {name: inputs[name].to(self.device) for name in ENCODER_INPUTS if name in inputs}
        hidden = self.text_encoder.model(**given, use_cache=False).last_hidden_state
        drop, slot = pipe.prompt_template_encode_start_idx, pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        embeds = tuple(states[span][drop:] for states, span in zip(hidden, spans, strict=True))
        return embeds, tuple((row[span] == slot)[drop:] for row, span in zip(ids, spans, strict=True))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `ImageModel.encode_images`."""
        pixels = (images * 2 - 1)[:, :, None].to(self.vae.dtype)
        modes = in_chunks(partial(encode_frame, self.vae), pixels, (images.shape[2], images.shape[3]))
        latents = (modes - self.latents_mean) / self.latents_std
        samples, channels, _, height, width = latents.shape
        packed: Tensor = self._pipeline._pack_latents(latents, samples, channels, height, width)
        return packed

    @torch.no_grad()
    def decode(self, latents: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """See `ImageModel.decode`."""
        height, width = size or self.image_size
        self.grid((height, width))  # refuse an impossible size
        spatial = self._pipeline._unpack_latents(latents, height, width, self._pipeline.vae_scale_factor)
        scaled = (spatial * self.latents_std + self.latents_mean).to(self.vae.dtype)
        images = in_chunks(partial(decode_frame, self.vae), scaled, (height, width))[:, :, 0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    # ----------------------------------------------------------------- the denoising evaluation

    def cache_prefix(self, conditioning: Conditioning) -> Conditioning:
        """See `ImageModel.cache_prefix`: here every layer depends on the timestep, so there is nothing to keep."""
        return conditioning

    def velocity(self, latents: Tensor, sigma: float | Tensor, conditioning: Conditioning) -> Tensor:
        """See `ImageModel.velocity`."""
        samples, tokens = latents.shape[:2]
        if samples != len(conditioning):
            raise ValueError(f"{samples} latents for a conditioning of {len(conditioning)} samples.")
        rows, dtype = conditioning.rows.tolist(), self.transformer.dtype
        hidden, shapes = latents, [(1, *conditioning.target_grid)]
        if conditioning.source_latents is not None and conditioning.source_grid is not None:
            hidden = torch.cat([hidden, samples_of(conditioning.source_latents, rows).to(hidden.dtype)], dim=1)
            shapes.append((1, *conditioning.source_grid))
        embeds = [conditioning.embeds[row] for row in rows]
        text = pad_sequence(embeds, batch_first=True)
        output: Tensor = self.transformer(
            hidden_states=hidden.to(dtype),
            encoder_hidden_states=text.to(dtype),
            encoder_hidden_states_mask=valid_tokens([len(e) for e in embeds], latents.device),
            timestep=a_sample(sigma, latents),
            img_shapes=[shapes] * samples,
            return_dict=False,
        )[0]
        return output[:, :tokens].float()

    # ----------------------------------------------------------------- loading

    @classmethod
    def load_pipeline(cls, path: str | Path, dtypes: WeightDtypes, **parts: nn.Module) -> DiffusionPipeline:
        """See `PipelineModel.load_pipeline`: model_index.json says which of the three it is."""
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(str(path), dtype=dtypes.by_component(), **parts)


def _span(mask: list[int]) -> slice:
    """Where a padded row holds tokens; padding is on one side."""
    start = mask.index(1)
    return slice(start, start + sum(mask))
