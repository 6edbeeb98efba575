"""Single images without the VAEs' feature cache, against diffusers' own `encode` and `decode`, bit for bit."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from flow_rl.models import QwenImage21, vae
from flow_rl.models.qwen_image import QwenImage
from flow_rl.models.tiny.qwen_image import build_pipeline_v1, build_vae_v1
from flow_rl.models.tiny.qwen_image_21 import build_pipeline, build_vae
from flow_rl.models.vae import decode_frame, encode_frame

FAMILIES = ("2.1", "v1")
SIZES = [(32, 32), (16, 64), (80, 48)]


def tiny_vae(family: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    made = build_vae() if family == "2.1" else build_vae_v1()
    return type(made).from_config({**made.config, **changes}).eval() if changes else made


def pixels(family: str, size: tuple[int, int], count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 4 if family == "2.1" else 3, 1, *size, generator=generator) * 2 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_encode_and_decode_give_diffusers_bits(family: str, size: tuple[int, int]) -> None:
    model, images = tiny_vae(family), pixels(family, size)
    latents = encode_frame(model, images)
    assert torch.equal(latents, model.encode(images).latent_dist.mode())
    decoded = decode_frame(model, latents * 3)  # large enough that some pixels are clamped
    assert torch.equal(decoded, model.decode(latents * 3).sample)
    assert decoded.shape == images.shape
    assert decoded.std() > 0.01


@torch.no_grad()
def test_a_vae_that_folds_pixels_into_channels() -> None:
    model = tiny_vae("2.1", patch_size=2, in_channels=16, out_channels=16)
    images = pixels("2.1", (32, 48))
    latents = encode_frame(model, images)
    assert torch.equal(latents, model.encode(images).latent_dist.mode())
    assert torch.equal(decode_frame(model, latents), model.decode(latents).sample)


@pytest.fixture(scope="module")
def models() -> dict[str, QwenImage21 | QwenImage]:
    text = ["a red pot"] * 4
    return {
        "2.1": QwenImage21(build_pipeline(text), image_size=(32, 32)),
        "v1": QwenImage(build_pipeline_v1(text), image_size=(32, 32)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_results_do_not_depend_on_the_chunk(models, family: str, monkeypatch) -> None:
    model, results = models[family], []
    images, latents = torch.rand(5, 3, 32, 32), torch.randn(5, *model.latent_shape(32, 32))
    for limit in (1, 2 * 32 * 32, vae.VAE_PIXELS):
        monkeypatch.setattr(vae, "VAE_PIXELS", limit)
        results.append((model.encode_images(images), model.decode(latents)))
    # A convolution's kernel on the CPU rounds differently with the size of its batch.
    for encoded, decoded in results[1:]:
        torch.testing.assert_close(encoded, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoded, results[0][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_feature_cache_is_filled(models, family: str, monkeypatch) -> None:
    """The cache keeps a copy of every convolution's input: more memory than the result itself takes."""
    model, seen = models[family], []

    def watch(module: nn.Module, args: tuple, named: dict) -> None:
        seen.append(inspect.signature(module.forward).bind(*args, **named).arguments.get("feat_cache"))

    parts = [module for part in (model.vae.encoder, model.vae.decoder) for module in part.modules()]
    hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in parts]
    try:
        model.encode_images(torch.rand(2, 3, 32, 32))
        model.decode(torch.randn(2, *model.latent_shape(32, 32)))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) > 50
    assert all(cache is None for cache in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_frames_are_refused(family: str) -> None:
    frames = torch.rand(1, 4 if family == "2.1" else 3, 5, 32, 32)
    with pytest.raises(ValueError, match="Expected single images"):
        encode_frame(tiny_vae(family), frames)
