"""The demo base in float32 on the device against float64 on the CPU: every way a sample is evaluated, and gradients.

Shapes: P prompts, N samples, S latent tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row, relative
from benchmarks.gpu.machine import tf32
from flow_rl.models import Conditioning, ImageModel, load_image_model

BASE = "demo/base"
SIZE = (32, 32)
PROMPTS = ("a person with red hair", "a potted tulip in a blue pot on a yellow background", "a red creature")
SIGMA = 0.7
#: RMS error over RMS value. TF32 keeps 10 of 23 bits of a product's factors.
LIMITS = {False: 1e-5, True: 1e-3}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What both models are given, on the CPU.

    Attributes:
        images: source images in [0, 1], (P, 3, H, W).
        latents: (2 P, S, C).
        text: conditioning of P prompts.
        edit: the same with source images.
    """

    images: Tensor
    latents: Tensor
    text: Conditioning
    edit: Conditioning


def base(device: torch.device, dtype: torch.dtype = torch.float32) -> ImageModel:
    """The demo base, its transformer ready to be trained."""
    model = load_image_model(BASE, image_size=SIZE)
    model.transformer.requires_grad_(True)
    return model.to(device, dtype)


def inputs(reference: ImageModel) -> Inputs:
    """The same for every device: conditioning from the reference's encoders."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(PROMPTS), 3, *SIZE, generator=generator)
    latents = torch.randn(2 * len(PROMPTS), *reference.latent_shape(*SIZE), generator=generator)
    with torch.no_grad():
        text, edit = reference.encode(PROMPTS), reference.encode(PROMPTS, images)
    return Inputs(images=images, latents=latents, text=text, edit=edit)


def moved(conditioning: Conditioning, device: torch.device) -> Conditioning:
    """The same conditioning on another device."""
    source = conditioning.source_latents
    return replace(
        conditioning,
        embeds=tuple(e.to(device) for e in conditioning.embeds),
        image_slots=tuple(m.to(device) for m in conditioning.image_slots),
        source_latents=None if source is None else source.to(device),
    )


def cases() -> Mapping[str, Callable[[ImageModel, Inputs, torch.device], Tensor]]:
    """What is compared, by name: each gives one tensor."""

    def velocity(
        pick: Callable[[Inputs], Conditioning], *, cached: bool = False
    ) -> Callable[[ImageModel, Inputs, torch.device], Tensor]:
        def evaluate(model: ImageModel, given: Inputs, device: torch.device) -> Tensor:
            conditioning = moved(pick(given), device)
            latents = given.latents[: len(conditioning)].to(device)
            with torch.no_grad():
                conditioning = model.cache_prefix(conditioning) if cached else conditioning
                return model.velocity(latents, SIGMA, conditioning)

        return evaluate

    def gradient(pick: Callable[[Inputs], Conditioning]) -> Callable[[ImageModel, Inputs, torch.device], Tensor]:
        def evaluate(model: ImageModel, given: Inputs, device: torch.device) -> Tensor:
            conditioning = moved(pick(given), device)
            model.transformer.zero_grad(set_to_none=True)
            model.velocity(
                given.latents[: len(conditioning)].to(device), SIGMA, conditioning
            ).square().mean().backward()
            found = [p.grad.flatten() for p in model.transformer.parameters() if p.grad is not None]
            model.transformer.zero_grad(set_to_none=True)
            return torch.cat(found)

        return evaluate

    @torch.no_grad()
    def text(model: ImageModel, given: Inputs, device: torch.device) -> Tensor:
        return torch.cat(model.encode(PROMPTS).embeds)

    @torch.no_grad()
    def text_of_edit(model: ImageModel, given: Inputs, device: torch.device) -> Tensor:
        return torch.cat(model.encode(PROMPTS, given.images.to(device)).embeds)

    def one(given: Inputs) -> Conditioning:
        return given.text.select([1])

    def shared(given: Inputs) -> Conditioning:
        return given.text.select([1, 1, 1, 1])

    def padded(given: Inputs) -> Conditioning:
        return given.text.repeat_interleave(2)

    def edit(given: Inputs) -> Conditioning:
        return given.edit.repeat_interleave(2)

    return {
        "encode text": text,
        "encode an edit's text": text_of_edit,
        "encode images": lambda model, given, device: model.encode_images(given.images.to(device)),
        "velocity, prefix and target together": velocity(one),
        "velocity, shared prefix": velocity(shared),
        "velocity, padded prefixes": velocity(padded),
        "velocity, padded prefixes kept": velocity(padded, cached=True),
        "velocity, edit": velocity(edit),
        "decode": lambda model, given, device: model.decode(given.latents.to(device)),
        "gradient, shared prefix": gradient(shared),
        "gradient, padded prefixes": gradient(padded),
        "gradient, edit": gradient(edit),
    }


def parity(bench: Bench) -> Iterator[Row]:
    """Float32 on the device against float64 on the CPU, TF32 off and, on a GPU, on."""
    cpu = torch.device("cpu")
    reference = base(cpu, torch.float64)
    given = inputs(reference)
    model = base(bench.device)
    expected = {name: case(reference, given, cpu) for name, case in cases().items()}
    for rounded in (False, True) if bench.cuda else (False,):
        with tf32(rounded):
            for name, case in cases().items():
                found = case(model, given, bench.device)
                yield Row(
                    name=f"{name}, TF32 {'on' if rounded else 'off'}",
                    values={"error": relative(found, expected[name])},
                    limits={"error": LIMITS[rounded]},
                )
