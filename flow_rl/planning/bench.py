"""Runs the project's own code on the meta device and reads what each moment of an iteration takes.

Whatever the generator, the objective or the VAE do is what is counted. Blocks of a transformer are alike, so two
shallow transformers are run and the reading of the whole one follows: bytes and operations grow evenly with the depth.

Shapes: P prompts, M samples, L text tokens, S latent tokens, C latent channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from flow_rl.flow.guidance import guide
from flow_rl.models import Conditioning
from flow_rl.models.loading import FAMILIES, check_model_path
from flow_rl.models.pipeline_model import PipelineModel
from flow_rl.models.qwen_image_21 import TOKENS_A_SLOT
from flow_rl.models.workload import Loss
from flow_rl.planning.meter import META, Meter, Reading, hollow, metered
from flow_rl.planning.weights import Components

#: blocks of the two shallow transformers; the last block differs from the others
SHALLOW = (2, 3)
#: layers of the text encoder that are run: none outlives the next one
TEXT_LAYERS = 4
#: text tokens of a blank prompt, template included
BLANK_TOKENS = 8
#: noise level of an evaluation; no count depends on it
_SIGMA = 0.5


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes of weights as a forward sees them.

    Attributes:
        trained: of the transformer's trained weights.
        frozen: of the transformer's others.
        text: of the text encoder.
    """

    trained: torch.dtype
    frozen: torch.dtype
    text: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is evaluated at a time.

    Attributes:
        path: of the model.
        precision: of its weights.
        size: height and width of images in pixels.
        samples: M.
        prompts: P, distinct ones among them.
        text: L, tokens of a prompt.
        edit: whether every prompt has a source image, as large as the image to make.
        sharded: whether the weights are gathered from shards.
    """

    path: str
    precision: Precision
    size: int
    samples: int
    prompts: int
    text: int
    edit: bool
    sharded: bool


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """Readings of a rollout's moments.

    Attributes:
        prefix: what `cache_prefix` computes, for both branches.
        evaluation: one denoising evaluation with guidance, beside the prefixes.
        conditional: its conditional part.
        unconditional: its unconditional part; None without guidance.
    """

    prefix: Reading
    evaluation: Reading
    conditional: Reading
    unconditional: Reading | None


@dataclass(frozen=True, kw_only=True)
class Update:
    """Readings of a micro-batch: its forward with the loss, and its backward."""

    forward: Reading
    backward: Reading

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of both."""
        return max(self.forward.peak, self.forward.kept + self.backward.peak)


class _Pipeline(SimpleNamespace):
    """A pipeline's components; what else is asked for is the class's own, which takes seconds to import."""

    def __getattr__(self, name: str) -> Any:
        import diffusers

        return getattr(getattr(diffusers, self.__dict__["kind"]), name)


@contextmanager
def model_of(parts: Components, case: Case, layers: int) -> Iterator[tuple[PipelineModel, Meter]]:
    """The generator around parts on the meta device, with so many of its blocks; a meter that disregards weights."""
    blocks, transformer = parts.transformer.transformer_blocks, parts.transformer
    _cast(parts, case.precision)
    kind = check_model_path(case.path)
    compression = getattr(parts.vae.config, "scale_factor_spatial", None) or 8
    pipeline = _Pipeline(
        kind=kind, transformer=transformer, text_encoder=parts.text_encoder, vae=parts.vae, scheduler=None,
        vae_scale_factor=compression, config={},
    )  # fmt: skip
    wanted = [p.requires_grad for p in transformer.parameters()]
    model = FAMILIES[kind](pipeline, image_size=(case.size, case.size)).to(META)
    model.uniform_forwards = case.sharded
    transformer.transformer_blocks = nn.ModuleList(blocks[:layers])
    try:
        with metered() as meter:
            meter.disregard((*model.parameters(), *model.buffers()))
            yield model, meter
    finally:
        transformer.transformer_blocks = blocks
        for parameter, required in zip(transformer.parameters(), wanted, strict=True):
            parameter.grad = None
            parameter._post_accumulate_grad_hooks = None
            parameter.requires_grad_(required)


def _cast(parts: Components, precision: Precision) -> None:
    for parameter in parts.transformer.parameters():
        dtype = precision.trained if parameter.requires_grad else precision.frozen
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    parts.text_encoder.to(precision.text)


def conditioning(model: PipelineModel, case: Case, *, blank: bool = False) -> Conditioning:
    """What `encode` would give for the prompts of a case."""
    text, config = BLANK_TOKENS if blank else case.text, model.transformer.config
    grid = model.grid()
    slots = math.prod(grid) // TOKENS_A_SLOT if case.edit else 0
    prompts = 1 if blank and not case.edit else case.prompts
    width = config.get("context_in_dim") or config["joint_attention_dim"]
    masks = tuple(torch.zeros(text + slots, dtype=torch.bool) for _ in range(prompts))
    for mask in masks:
        mask[text // 2 : text // 2 + slots] = True
    dtype = next(model.text_encoder.parameters()).dtype
    rows = torch.arange(prompts)
    return Conditioning(
        embeds=tuple(hollow(text + slots, width, dtype=dtype) for _ in masks),
        image_slots=masks,
        target_grid=grid,
        source_grid=grid if case.edit else None,
        source_latents=hollow(prompts, *model.latent_shape(case.size, case.size)) if case.edit else None,
        rows=rows if prompts == case.prompts else rows.new_zeros(case.prompts),
    )


def _spread(condition: Conditioning, samples: int) -> Conditioning:
    """Samples of these prompts, as evenly as they go."""
    prompts = len(condition)
    return condition.select([i * prompts // samples for i in range(samples)])


@functools.lru_cache(maxsize=256)
def denoising(parts: Components, case: Case, guided: bool) -> Denoising:
    """Readings of prefix and evaluation, without gradient."""

    def run(layers: int) -> list[Reading]:
        with model_of(parts, case, layers) as (model, meter), torch.no_grad():
            model.transformer.eval()
            branches = [conditioning(model, case)] + [conditioning(model, case, blank=True)] * guided
            cached, prefix = meter.read(lambda: [model.cache_prefix(branch) for branch in branches])
            found = []

            def evaluate() -> Tensor:
                latents = hollow(case.samples, *model.latent_shape(case.size, case.size))
                velocities = []
                for branch in cached:
                    grouped = _spread(branch, case.samples)
                    v, reading = meter.read(functools.partial(model.velocity, latents, _SIGMA, grouped))
                    velocities.append(v)
                    found.append(reading)
                return guide(velocities[0], velocities[1], 4.0) if guided else velocities[0]

            _, whole = meter.read(evaluate)
            return [prefix, whole, *found]

    prefix, evaluation, conditional, *rest = _whole(parts, case, run)
    return Denoising(
        prefix=prefix, evaluation=evaluation, conditional=conditional, unconditional=rest[0] if rest else None
    )


@functools.lru_cache(maxsize=256)
def update(parts: Components, case: Case, loss: Loss, *, guided: bool, checkpointing: bool) -> Update:
    """Readings of a micro-batch's forward and backward.

    Gradients have been there since the first micro-batch, so that only new ones on their way to them count. Where
    weights are sharded, a gradient goes once it is complete: its rank has the sum.

    Args:
        parts: the generator's.
        case: the micro-batch.
        loss: of the run.
        guided: whether the loss evaluates the unconditional branch too.
        checkpointing: whether blocks are recomputed in the backward pass.
    """

    def run(layers: int) -> list[Reading]:
        with model_of(parts, case, layers) as (model, meter), _recomputing(model.transformer.train(), checkpointing):
            for parameter in (p for p in model.transformer.parameters() if p.requires_grad):
                if case.sharded:
                    parameter.register_post_accumulate_grad_hook(_forget)
                else:
                    parameter.grad = torch.empty_like(parameter)
                    meter.disregard([parameter.grad])
            branches = [_spread(conditioning(model, case, blank=blank), case.samples) for blank in (False, True)]
            compute = loss(model, branches[0], branches[1] if guided else None)
            made, forward = meter.read(compute)
            _, backward = meter.read(lambda: torch.autograd.backward([made]))
            return [forward, backward]

    forward, backward = _whole(parts, case, run)
    return Update(forward=forward, backward=backward)


@contextmanager
def _recomputing(transformer: ModelMixin, checkpointing: bool) -> Iterator[None]:
    """The transformer with or without gradient checkpointing inside the block."""

    def switch(on: bool) -> None:
        transformer.enable_gradient_checkpointing() if on else transformer.disable_gradient_checkpointing()

    before = transformer.is_gradient_checkpointing
    switch(checkpointing)
    try:
        yield
    finally:
        switch(before)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


#: for which sizes a transformer has made its rotary tables, which it keeps: no layer's bytes
_WARM: WeakKeyDictionary[nn.Module, set[tuple[int, int, bool]]] = WeakKeyDictionary()


def _whole(parts: Components, case: Case, run: Callable[[int], list[Reading]]) -> list[Reading]:
    """Readings at the transformer's full depth."""
    depth = len(parts.transformer.transformer_blocks)
    if depth <= SHALLOW[1]:
        return run(depth)
    warm, sizes = _WARM.setdefault(parts.transformer, set()), (case.size, case.text, case.edit)
    if sizes not in warm:
        run(1)
        warm.add(sizes)
    one, two = (run(layers) for layers in SHALLOW)
    return [a.deeper(b, depth - SHALLOW[1]) for a, b in zip(one, two, strict=True)]


@functools.lru_cache(maxsize=64)
def decode(parts: Components, case: Case) -> Reading:
    """Latents of all samples to images."""
    with model_of(parts, case, 1) as (model, meter):
        latents = hollow(case.samples, *model.latent_shape(case.size, case.size))
        return meter.read(lambda: model.decode(latents))[1]


@functools.lru_cache(maxsize=64)
def encode_sources(parts: Components, case: Case) -> Reading:
    """Source images of all prompts to latents."""
    with model_of(parts, case, 1) as (model, meter):
        images = hollow(case.prompts, 3, case.size, case.size)
        return meter.read(lambda: model.encode_images(images))[1]


@functools.lru_cache(maxsize=64)
def encode_text(parts: Components, case: Case) -> Reading:
    """Prompts to embeddings; for edits the text encoder sees the source images too."""
    encoder = parts.text_encoder
    language, layers = encoder.model.language_model, encoder.model.language_model.layers
    _cast(parts, case.precision)
    language.layers = layers[:TEXT_LAYERS]
    try:
        with metered() as meter, torch.no_grad():
            meter.disregard((*encoder.parameters(), *encoder.buffers()))
            inputs = _text_inputs(encoder.config, case)
            return meter.read(lambda: encoder.model(**inputs, use_cache=False))[1]
    finally:
        language.layers = layers


def _text_inputs(config: Any, case: Case) -> dict[str, Tensor]:
    """What a processor gives for prompts of a case, source images included."""
    ids = torch.zeros(case.prompts, case.text, dtype=torch.long)
    if not case.edit:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = config.vision_config
    merge = vision.spatial_merge_size
    side = case.size // (vision.patch_size * merge) * merge  # patches, a multiple of those that are merged
    start, image = (torch.full((case.prompts, n), t) for n, t in (
        (1, config.vision_start_token_id), (side**2 // merge**2, config.image_token_id)))  # fmt: skip
    ids = torch.cat([ids[:, :1], start, image, ids[:, 1:]], dim=1)
    channels = getattr(vision, "in_channels", None) or vision.in_chans
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": hollow(case.prompts * side**2, channels * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, side, side]] * case.prompts),
    }
