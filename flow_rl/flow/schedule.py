"""Noise levels: the schedule, taken from the scheduler itself, and the straight line between data and noise.

Rollout, training and distillation share one list of sigmas, as floats: a scheduler's integer timesteps lose
them.

Shapes: N samples, ... the latent dimensions, T denoising steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flow_rl.flow.broadcast import as_column


class Scheduler(Protocol):
    """What is used of diffusers' `FlowMatchEulerDiscreteScheduler`."""

    config: Mapping[str, Any]
    sigmas: Tensor

    def set_timesteps(self, *, sigmas: list[float], mu: float) -> None:
        """Make the schedule from unshifted sigmas."""
        ...


def shift_mu(image_tokens: int, config: Mapping[str, Any]) -> float:
    """Log of the time shift for an image of that many tokens, linear between two anchors.

    Args:
        image_tokens: number of target latent tokens the transformer sees.
        config: the scheduler's; `base_image_seq_len`, `max_image_seq_len`, `base_shift` and `max_shift`, with
            diffusers' own fallbacks.

    Returns:
        mu, which the scheduler uses where it shifts dynamically and ignores elsewhere.

    Raises:
        ValueError: for fewer than one token.
    """
    if image_tokens < 1:
        raise ValueError(f"image_tokens must be the number of latent tokens, from 1 up; received {image_tokens}.")
    base_len: int = config.get("base_image_seq_len", 256)
    base_shift: float = config.get("base_shift", 0.5)
    slope: float = (config.get("max_shift", 1.15) - base_shift) / (config.get("max_image_seq_len", 4096) - base_len)
    return image_tokens * slope + (base_shift - slope * base_len)


def sigma_schedule(
    scheduler: Scheduler,
    num_steps: int,
    *,
    image_tokens: int,
    sample_sigmas: Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Make the noise levels that diffusers' Qwen-Image pipelines would step through.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler` or its like; left as it is.
        num_steps: T.
        image_tokens: number of target latent tokens, for schedulers that shift by resolution.
        sample_sigmas: the levels that a pipeline prescribes, T of them without the final 0, as a few-step variant does
            (`model_index.json`). They replace the T equal steps and go through the scheduler like them.
        device: where to put the result; None is the CPU.

    Returns:
        Descending, float32, shape (T + 1,), the last one 0.

    Raises:
        ValueError: for fewer than one step, another number of steps than `sample_sigmas` has, or a scheduler that does
            not end in 0 or does not descend.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be from 1 up, received {num_steps}.")
    if sample_sigmas is not None and len(sample_sigmas) != num_steps:
        raise ValueError(
            f"num_steps is {num_steps}, but the model prescribes {len(sample_sigmas)} noise levels (sample_sigmas in "
            f"its model_index.json: {[round(float(s), 4) for s in sample_sigmas]}). Diffusers' pipeline steps through "
            f"these, whatever number of steps it is asked for. Set num_steps to {len(sample_sigmas)}; or remove "
            "sample_sigmas from model_index.json to train, and later sample, on another schedule."
        )
    # A copy, so that a pipeline that owns the scheduler keeps its own schedule. Not rebuilt from its config:
    # that would forget a shift set afterwards.
    scheduler = copy.copy(scheduler)
    unshifted = _unshifted(num_steps) if sample_sigmas is None else list(sample_sigmas)
    scheduler.set_timesteps(sigmas=unshifted, mu=shift_mu(image_tokens, scheduler.config))
    sigmas = scheduler.sigmas.to(dtype=torch.float32)
    if len(sigmas) != num_steps + 1 or sigmas[-1] != 0 or not bool((sigmas.diff() < 0).all()):
        raise ValueError(
            f"{type(scheduler).__name__} made {[round(s, 4) for s in sigmas.tolist()]} of {num_steps} steps; "
            f"expected {num_steps + 1} noise levels that descend to 0. Use a FlowMatchEulerDiscreteScheduler "
            "without inverted sigmas or a terminal shift of 0."
        )
    return sigmas.to(device)


def noise_latents(x_0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Put clean latents at a noise level: `x_t = (1 - sigma) x_0 + sigma eps`.

    Args:
        x_0: clean latents, shape (N, ...).
        noise: eps, standard normal, shape (N, ...).
        sigma: in [0, 1]; one number, or one a row, shape (N,).

    Returns:
        x_t, float32, shape (N, ...).
    """
    level = as_column(sigma, x_0, "sigma")
    return (1 - level) * x_0.float() + level * noise.float()


def predict_x0(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Clean latents that a velocity implies: `x_0_hat = x_t - sigma v`, float32, shape (N, ...).

    Args:
        x: latents at sigma, shape (N, ...).
        velocity: v there, shape (N, ...).
        sigma: one number, or one a row, shape (N,).
    """
    return x.float() - as_column(sigma, x, "sigma") * velocity.float()


def predict_noise(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """Noise that a velocity implies: `eps_hat = x_t + (1 - sigma) v`, float32, shape (N, ...).

    Args:
        x: latents at sigma, shape (N, ...).
        velocity: v there, shape (N, ...).
        sigma: one number, or one a row, shape (N,).
    """
    return x.float() + (1 - as_column(sigma, x, "sigma")) * velocity.float()


def _unshifted(num_steps: int) -> list[float]:
    """T equal steps from 1 to 1/T in float64, each number as numpy's linspace makes it."""
    if num_steps == 1:
        return [1.0]
    step = (1 / num_steps - 1.0) / (num_steps - 1)
    return [1.0 + i * step for i in range(num_steps - 1)] + [1 / num_steps]
