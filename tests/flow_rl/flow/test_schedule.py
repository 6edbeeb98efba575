"""Schedules against diffusers' own, and the straight line between data and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift, retrieve_timesteps

from flow_rl.flow.schedule import noise_latents, predict_noise, predict_x0, shift_mu, sigma_schedule

DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
}
CONFIGS = {
    "static": {"shift": 3.0, "use_dynamic_shifting": False},
    "none": {"shift": 1.0},
    "dynamic": DYNAMIC,
    "terminal": DYNAMIC | {"shift_terminal": 0.02, "time_shift_type": "exponential"},
    "linear": DYNAMIC | {"time_shift_type": "linear"},
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("num_steps", [2, 7, 10, 40, 50])
@pytest.mark.parametrize("image_tokens", [16, 4096])
def test_equals_the_pipeline_schedule(name: str, num_steps: int, image_tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    ours = sigma_schedule(scheduler, num_steps, image_tokens=image_tokens)
    config = scheduler.config
    mu = calculate_shift(
        image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    assert torch.equal(ours, scheduler.sigmas)
    assert ours.dtype == torch.float32
    assert ours.shape == (num_steps + 1,)
    assert ours[-1] == 0
    assert shift_mu(image_tokens, config) == pytest.approx(mu, rel=1e-12)


def test_a_single_step_goes_straight_from_noise_to_data() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIGS["static"])
    assert sigma_schedule(scheduler, 1, image_tokens=16).tolist() == [1.0, 0.0]


def test_known_shifted_levels() -> None:
    # shift s maps sigma to s sigma / (1 + (s - 1) sigma).
    sigmas = sigma_schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 4, image_tokens=16)
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_scheduler_is_left_alone_and_a_later_shift_counts() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    before, timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
    three = sigma_schedule(scheduler, 40, image_tokens=16)
    assert torch.equal(scheduler.sigmas, before)
    assert torch.equal(scheduler.timesteps, timesteps)
    scheduler.set_shift(1.0)
    one = sigma_schedule(scheduler, 40, image_tokens=16)
    torch.testing.assert_close(one, torch.linspace(1, 0, 41))
    assert (three[1:-1] > one[1:-1]).all()


def test_noising_and_predictions_are_inverse() -> None:
    x_0, eps = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.7, 0.5, 0.1, 0.0])
    x_t = noise_latents(x_0, eps, sigma)
    torch.testing.assert_close(predict_x0(x_t, eps - x_0, sigma), x_0)
    torch.testing.assert_close(predict_noise(x_t, eps - x_0, sigma), eps)
    assert torch.equal(x_t[0], eps[0])
    assert torch.equal(x_t[-1], x_0[-1])
    torch.testing.assert_close(x_t[1], 0.3 * x_0[1] + 0.7 * eps[1])


def test_velocity_is_the_slope_of_the_line() -> None:
    x_0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    slope = (noise_latents(x_0, eps, 0.75) - noise_latents(x_0, eps, 0.25)) / 0.5
    torch.testing.assert_close(slope.double(), eps - x_0, rtol=1e-5, atol=1e-5)


def test_bad_input_is_explained() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="num_steps must be from 1 up, received 0"):
        sigma_schedule(scheduler, 0, image_tokens=16)
    with pytest.raises(ValueError, match=r"image_tokens .* received 0"):
        sigma_schedule(scheduler, 4, image_tokens=0)
    # A single step has nothing to stretch: diffusers divides 0 by 0.
    with pytest.raises(ValueError, match="descend to 0"), np.errstate(invalid="ignore"):
        sigma_schedule(FlowMatchEulerDiscreteScheduler(**CONFIGS["terminal"]), 1, image_tokens=16)
    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="descend to 0"):
        sigma_schedule(inverted, 4, image_tokens=16)
    with pytest.raises(ValueError, match=r"sigma must be one number, or one a row with shape \(3,\)"):
        noise_latents(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2))
