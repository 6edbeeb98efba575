"""Qwen-Image v1: parity with diffusers' own pipelines, both tasks, and samples that ignore their batch."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import Image

from flow_rl.flow.guidance import Guidance
from flow_rl.flow.rollout import rollout
from flow_rl.models import load_image_model
from flow_rl.models.images import to_uint8
from flow_rl.models.loading import peek_grid, peek_sigmas
from flow_rl.models.qwen_image import QwenImage
from flow_rl.models.tiny.qwen_image import build_pipeline_v1
from flow_rl.rl.sampling import Sampler

PROMPTS = ["a portrait of a person with red hair", "a tulip in a blue pot, yellow background", "a red pot"]
STEPS, SCALE = 6, 2.5
KINDS = ("t2i", "edit", "edit_plus")


@pytest.fixture(scope="module")
def models() -> dict[str, QwenImage]:
    return {kind: QwenImage(build_pipeline_v1(PROMPTS * 4, kind=kind), image_size=(32, 48)) for kind in KINDS}


def noise(model: QwenImage, count: int) -> torch.Tensor:
    return torch.randn(count, *model.latent_shape(32, 48), generator=torch.Generator().manual_seed(0))


def pictures(count: int, seed: int = 3) -> torch.Tensor:
    made = torch.rand(count, 3, 32, 48, generator=torch.Generator().manual_seed(seed))
    return made.mul(255).round() / 255


@pytest.mark.parametrize("kind", KINDS)
def test_rollout_matches_the_diffusers_pipeline(models, kind, monkeypatch) -> None:
    model = models[kind]
    source = None if kind == "t2i" else pictures(1)
    # Diffusers scales every source to 1024 x 1024 pixels' worth: the same rule at a toy's area leaves ours as it is.
    if kind == "edit":
        monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: (48, 32, None))
    if kind == "edit_plus":
        sizes = {edit_plus.VAE_IMAGE_SIZE: (48, 32), 1024: (32, 32)}
        monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", 1024)
        monkeypatch.setattr(edit_plus, "calculate_dimensions", lambda area, ratio: sizes[area])
    guidance = Guidance(scale=SCALE, rescale=True)
    sampler = Sampler(sigmas=model.sigmas(STEPS), guidance=guidance, size=(32, 48), seed=0)
    latents = noise(model, 1)
    velocity = sampler.velocity(model, PROMPTS[:1], source)
    ours = model.decode(rollout(velocity, latents, sampler.sigmas).latents)
    model.pipeline.set_progress_bar_config(disable=True)
    theirs = model.pipeline(
        **({} if source is None else {"image": Image.fromarray(to_uint8(source)[0])}),
        prompt=PROMPTS[0],
        negative_prompt=" ",
        true_cfg_scale=SCALE,
        height=32,
        width=48,
        num_inference_steps=STEPS,
        latents=latents,
        output_type="pt",
    ).images
    assert ours.std() > 0.01  # a picture, not a constant that would agree with anything
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["t2i", "edit_plus"])
def test_velocity_of_a_sample_ignores_its_batch(models, kind) -> None:
    model, sources = models[kind], None if kind == "t2i" else pictures(3)
    conditioning = model.encode(PROMPTS, sources).repeat_interleave(2)
    latents, sigma = noise(model, 6), torch.linspace(0.2, 1.0, 6)
    together = model.velocity(latents, sigma, conditioning)
    assert len({len(e) for e in conditioning.embeds}) > 1  # so there was padding to ignore
    for i in range(6):
        own = model.encode([PROMPTS[i // 2]], None if sources is None else sources[i // 2][None])
        alone = model.velocity(latents[i : i + 1], sigma[i : i + 1], own)
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-6, rtol=1e-5)


def test_source_and_instruction_both_matter(models) -> None:
    model, latents = models["edit"], noise(models["edit"], 1)
    base = model.velocity(latents, 0.5, model.encode(PROMPTS[:1], pictures(1)))
    assert (base - model.velocity(latents, 0.5, model.encode(PROMPTS[1:2], pictures(1)))).abs().max() > 1e-4
    assert (base - model.velocity(latents, 0.5, model.encode(PROMPTS[:1], pictures(1, 9)))).abs().max() > 1e-4


def test_schedule_is_the_scheduler_s_own(models, tmp_path) -> None:
    model = models["t2i"]
    sigmas = model.sigmas(STEPS)
    assert sigmas[-2] == pytest.approx(0.02)  # shift_terminal
    model.save_pretrained(tmp_path)
    assert peek_grid(tmp_path, (32, 48)) == (2, 3)
    assert torch.equal(peek_sigmas(tmp_path, STEPS, image_size=(32, 48)), sigmas)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_keep_the_velocity(models, kind, tmp_path) -> None:
    model, sources = models[kind], None if kind == "t2i" else pictures(2)
    model.save_pretrained(tmp_path)
    loaded = load_image_model(tmp_path, image_size=(32, 48))
    assert type(loaded.pipeline) is type(model.pipeline)
    latents = noise(model, 2)
    with torch.no_grad():
        ours = model.velocity(latents, 0.4, model.encode(PROMPTS[:2], sources))
        theirs = loaded.velocity(latents, 0.4, loaded.encode(PROMPTS[:2], sources))
    assert torch.equal(ours, theirs)


def test_a_checkpoint_for_the_other_task_is_named(models) -> None:
    with pytest.raises(ValueError, match=r"takes no source image.*Qwen-Image-Edit-2509"):
        models["t2i"].encode(PROMPTS[:1], pictures(1))
    with pytest.raises(ValueError, match=r"takes a source image.*Qwen-Image\."):
        models["edit"].encode(PROMPTS[:1])


def test_impossible_size_names_the_multiple(models) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        models["t2i"].latent_shape(40, 32)
