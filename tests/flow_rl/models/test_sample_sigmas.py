"""Noise levels that a checkpoint prescribes in model_index.json: diffusers' pipeline follows them, so rollouts must."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline

from flow_rl.flow.guidance import Guidance
from flow_rl.flow.rollout import rollout
from flow_rl.flow.schedule import sigma_schedule
from flow_rl.models import load_image_model
from flow_rl.models.loading import peek_sample_sigmas, peek_sigmas
from flow_rl.models.tiny.qwen_image import build_pipeline_v1
from flow_rl.rl.sampling import Sampler

PROMPT = "a tulip in a blue pot, yellow background"
SAMPLE_SIGMAS = [1.0, 0.95, 0.7, 0.2]
SCHEDULERS = {
    "as given": {"shift": 1.0},
    "shifted": {"shift": 3.0},
    "shifted by resolution": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9},
    "stretched": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
}


@pytest.fixture
def few_step(tiny_pipeline: QwenImage21Pipeline, tmp_path: Path) -> Callable[..., Path]:
    """`few_step(scheduler settings)`: a checkpoint whose model_index.json prescribes `SAMPLE_SIGMAS`."""

    def make(**settings: object) -> Path:
        path = tmp_path / "few_step"
        tiny_pipeline.save_pretrained(path)
        FlowMatchEulerDiscreteScheduler(**settings).save_pretrained(path / "scheduler")
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        (path / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": SAMPLE_SIGMAS}), encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rollout_is_what_the_diffusers_pipeline_draws(name: str, few_step: Callable[..., Path]) -> None:
    path = few_step(**SCHEDULERS[name])
    model = load_image_model(path, image_size=(32, 32))
    sigmas = model.sigmas(len(SAMPLE_SIGMAS))
    latents = torch.randn(1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    sampler = Sampler(sigmas=sigmas, guidance=Guidance(scale=1), size=(32, 32), seed=0)
    ours = model.decode(rollout(sampler.velocity(model, [PROMPT]), latents, sigmas).latents)

    pipeline = QwenImage21Pipeline.from_pretrained(path)
    pipeline.vae_scale_factor = pipeline.vae.config.scale_factor_spatial  # the class assumes 16, and the toy has 8
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPT, height=32, width=32, latents=latents, output_type="pt").images  # it is not told of steps
    assert torch.equal(sigmas, pipeline.scheduler.sigmas)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs[:, :3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_peeked_schedule_and_export_keep_the_levels(name: str, few_step: Callable[..., Path], tmp_path: Path) -> None:
    path = few_step(**SCHEDULERS[name])
    model = load_image_model(path, image_size=(32, 32))
    assert torch.equal(peek_sigmas(path, 4, image_size=(32, 32)), model.sigmas(4))
    assert not torch.equal(model.sigmas(4), sigma_schedule(model.pipeline.scheduler, 4, image_tokens=16))
    model.save_pretrained(tmp_path / "export")
    assert peek_sample_sigmas(tmp_path / "export") == SAMPLE_SIGMAS
    assert torch.equal(peek_sigmas(tmp_path / "export", 4, image_size=(32, 32)), model.sigmas(4))


def test_another_number_of_steps_is_refused(few_step: Callable[..., Path], policy: Callable) -> None:
    path = few_step(shift=1.0)
    with pytest.raises(ValueError, match=r"prescribes 4 noise levels.*0\.95.*Set num_steps to 4; or remove"):
        peek_sigmas(path, 40, image_size=(32, 32))
    with pytest.raises(ValueError, match="Set num_steps to 4"):
        load_image_model(path, image_size=(32, 32)).sigmas(5)
    with pytest.raises(ValueError, match="Set num_steps to 4"):  # before the model loads
        policy(model_path=str(path), rollout={"num_steps": 8})
    assert policy(model_path=str(path), rollout={"num_steps": 4}).rollout_settings.num_steps == 4


def test_a_family_whose_pipeline_has_no_such_setting_ignores_it(tmp_path: Path) -> None:
    build_pipeline_v1([PROMPT] * 4).save_pretrained(tmp_path)
    before = peek_sigmas(tmp_path, 8, image_size=(32, 32))
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": SAMPLE_SIGMAS}), encoding="utf-8")
    assert torch.equal(peek_sigmas(tmp_path, 8, image_size=(32, 32)), before)
    assert torch.equal(load_image_model(tmp_path, image_size=(32, 32)).sigmas(8), before)
