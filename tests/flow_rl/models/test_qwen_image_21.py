"""Qwen-Image 2.1: parity with diffusers' own pipeline, and samples that ignore their batch."""

from __future__ import annotations

import pytest
import torch

from flow_rl.flow.guidance import Guidance
from flow_rl.flow.rollout import rollout
from flow_rl.models import QwenImage21, load_image_model
from flow_rl.models.images import to_uint8
from flow_rl.rl.sampling import Sampler

PROMPTS = ["a portrait of a person with red hair", "a tulip in a blue pot, yellow background", "a red pot"]
STEPS, SCALE = 6, 2.5


def noise(model: QwenImage21, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(seed))


def sampler(model: QwenImage21) -> Sampler:
    return Sampler(sigmas=model.sigmas(STEPS), guidance=Guidance(scale=SCALE), size=(32, 32), seed=0)


@pytest.mark.parametrize("edit", [False, True])
def test_rollout_matches_the_diffusers_pipeline(tiny_model: QwenImage21, edit: bool) -> None:
    source = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)).mul(255).round() / 255
    latents = noise(tiny_model, 1)
    velocity = sampler(tiny_model).velocity(tiny_model, PROMPTS[:1], source if edit else None)
    ours = tiny_model.decode(rollout(velocity, latents, tiny_model.sigmas(STEPS)).latents)

    from PIL import Image

    theirs = tiny_model.pipeline(
        PROMPTS[0],
        image=Image.fromarray(to_uint8(source)[0]) if edit else None,
        negative_prompt="",
        true_cfg_scale=SCALE,
        height=32,
        width=32,
        output_resolution=32,
        num_inference_steps=STEPS,
        latents=latents,
        output_type="pt",
    ).images
    assert ours.std() > 0.01  # a picture, not a constant that would agree with anything
    torch.testing.assert_close(ours, theirs[:, :3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("edit", [False, True])
def test_velocity_of_a_sample_ignores_its_batch(tiny_model: QwenImage21, edit: bool) -> None:
    sources = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)) if edit else None
    conditioning = tiny_model.encode(PROMPTS, sources).repeat_interleave(2)
    latents, sigma = noise(tiny_model, 6), torch.linspace(0.2, 1.0, 6)
    together = tiny_model.velocity(latents, sigma, conditioning)
    for i in range(6):
        own = tiny_model.encode([PROMPTS[i // 2]], None if sources is None else sources[i // 2][None])
        alone = tiny_model.velocity(latents[i : i + 1], sigma[i : i + 1], own)
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-6, rtol=1e-5)


def test_cached_prefix_gives_the_same_velocity(tiny_model: QwenImage21) -> None:
    conditioning = tiny_model.encode(PROMPTS).repeat_interleave(2)
    cached = tiny_model.cache_prefix(conditioning)
    latents = noise(tiny_model, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            tiny_model.velocity(latents, 0.7, cached),
            tiny_model.velocity(latents, 0.7, conditioning),
            atol=2e-6,
            rtol=1e-5,
        )


def test_shared_prefix_gives_the_same_gradient(tiny_model: QwenImage21) -> None:
    """Prefix computed once for four samples of a prompt, against four separate forwards, in float64."""
    model, latents = tiny_model, noise(tiny_model, 4)
    model.transformer.requires_grad_(True).double()
    try:
        conditioning = model.encode(PROMPTS[:1])

        def gradient(parts: list[slice]) -> list[torch.Tensor]:
            model.transformer.zero_grad()
            for part in parts:
                samples = conditioning.repeat_interleave(4).select(part)
                model.velocity(latents[part], 0.5, samples).square().sum().backward()
            return [p.grad.clone() for p in model.transformer.parameters() if p.grad is not None]

        shared, separate = gradient([slice(0, 4)]), gradient([slice(i, i + 1) for i in range(4)])
        assert len(shared) == len(separate) > 20
        for a, b in zip(shared, separate, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()) + 1e-9, rtol=1e-4)
    finally:
        model.transformer.float().requires_grad_(False)
        model.transformer.zero_grad(set_to_none=True)


def test_save_and_load_keep_the_velocity(tiny_model: QwenImage21, tmp_path) -> None:
    tiny_model.save_pretrained(tmp_path)
    loaded = load_image_model(tmp_path, image_size=(32, 32))
    latents = noise(tiny_model, 2)
    with torch.no_grad():
        ours = tiny_model.velocity(latents, 0.4, tiny_model.encode(PROMPTS[:2]))
        theirs = loaded.velocity(latents, 0.4, loaded.encode(PROMPTS[:2]))
    assert torch.equal(ours, theirs)


def test_impossible_size_names_the_multiple(tiny_model: QwenImage21) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny_model.latent_shape(40, 32)


def test_missing_model_suggests_the_nearest_name(tmp_path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match=r"Did you mean '.*base'"):
        load_image_model(tmp_path / "bsae", image_size=(32, 32))
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        load_image_model(tmp_path / "base", image_size=(32, 32))
