"""One denoising step as a distribution: where x_next may land, and how likely it was to land there.

Shapes: B rows, ... the latent dimensions.

Every kind returns a Gaussian `N(mean, std^2)` over x_next. With `dt = sigma_next - sigma < 0`:

    ode       mean = x + v dt
              std  = 0
    flow_sde  mean = x (1 + s^2/(2 sigma) dt) + v (1 + s^2 (1-sigma)/(2 sigma)) dt
              std  = s sqrt(-dt),  s = noise sqrt(sigma / (1 - sigma)); where sigma is 1,
              the schedule's second sigma takes its place in that denominator
    cps       mean = (1-sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) eps_hat
              std  = sigma_next sin(noise pi/2)
    dance     mean = x + v dt - noise^2/2 score dt,  score = -(x - (1-sigma) x0_hat)/sigma^2
              std  = noise sqrt(-dt)

Sources: Flow-GRPO (arXiv 2505.05470, yifan123/flow_grpo), Flow-CPS (IamCreateAI/FlowCPS), DanceGRPO
(arXiv 2505.07818, XueZeyue/DanceGRPO). At noise level 0 all of them are the ODE step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_rl.flow.broadcast import as_column, mean_per_row
from flow_rl.suggestions import nearest

KINDS = ("ode", "flow_sde", "cps", "dance")

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class Transition:
    """The distribution of x_next given x.

    Attributes:
        kind: which of `KINDS` made it.
        mean: float32, shape (B, ...).
        std: standard deviation of x_next around the mean, `sqrt(-dt)` included; float32, 0-d, or
            (B, 1, ..., 1) where every row has a step of its own.
        stochastic: False for the ODE step, which has no log-probability.
    """

    kind: str
    mean: Tensor
    std: Tensor
    stochastic: bool

    def sample(self, noise: Tensor) -> Tensor:
        """Draw x_next.

        Args:
            noise: standard normal, shape (B, ...).

        Returns:
            float32, shape (B, ...). Whoever stores it in a narrower dtype must carry on from the stored
            value and ask `log_prob` of it: the density of a rounded x_next is another number.
        """
        if not self.stochastic:
            return self.mean
        return self.mean + self.std * noise.float()

    def log_prob(self, x_next: Tensor) -> Tensor:
        """Log-density of x_next, averaged (not summed) over the latent dimensions as the published codes do.

        For `cps` the published code drops the constants and the 1/(2 std^2): `-(x_next - mean)^2`.

        Args:
            x_next: the value as it was stored, shape (B, ...).

        Returns:
            float32, shape (B,), with gradient through `mean`.

        Raises:
            ValueError: for a deterministic step.
        """
        if not self.stochastic:
            why = "kind 'ode'" if self.kind == "ode" else f"kind '{self.kind}' at noise level 0"
            raise ValueError(
                f"A step of {why} is deterministic: it has no log-probability. Score stochastic "
                f"steps only, or use one of {', '.join(KINDS[1:])} with a noise level above 0."
            )
        squared_error = (x_next.float() - self.mean).square()
        if self.kind == "cps":
            return -mean_per_row(squared_error)
        density = -squared_error / (2 * self.std.square()) - self.std.log() - _LOG_SQRT_2PI
        return mean_per_row(density)


def transition(
    kind: str,
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float,
    sigma_cap: float | Tensor,
) -> Transition:
    """Make the distribution of one denoising step.

    Args:
        kind: one of `KINDS`.
        x: latents at sigma, shape (B, ...), any float dtype.
        velocity: `v = eps - x_0` predicted there, shape (B, ...), any float dtype. Gradients flow through it.
        sigma: noise level of x in (0, 1]; one number, or one a row, shape (B,).
        sigma_next: noise level of x_next in [0, sigma); one number, or one a row, shape (B,).
        noise_level: how much randomness; eta for `dance`; in [0, 1] for `cps`. 0 makes every kind the ODE.
        sigma_cap: the schedule's second sigma, which `flow_sde` puts in its denominator where sigma is 1.

    Returns:
        The distribution, computed in float32. With `cps` and sigma_next = 0 its std is 0.

    Raises:
        ValueError: for an unknown kind, shapes that disagree, or numbers out of range. Numbers are
            checked unless they lie on an accelerator, where looking at them would make the host wait.
    """
    _check(kind, x, velocity, sigma, sigma_next, noise_level, sigma_cap)
    x, velocity = x.float(), velocity.float()
    sigma, sigma_next = as_column(sigma, x, "sigma"), as_column(sigma_next, x, "sigma_next")
    dt = sigma_next - sigma
    if kind == "ode" or noise_level == 0:
        return Transition(kind=kind, mean=x + velocity * dt, std=torch.zeros_like(dt), stochastic=False)
    if kind == "flow_sde":
        mean, std = _flow_sde(x, velocity, sigma, dt, noise_level, as_column(sigma_cap, x, "sigma_cap"))
    elif kind == "cps":
        mean, std = _cps(x, velocity, sigma, sigma_next, noise_level)
    else:
        mean, std = _dance(x, velocity, sigma, dt, noise_level)
    return Transition(kind=kind, mean=mean, std=std, stochastic=True)


def _flow_sde(
    x: Tensor, velocity: Tensor, sigma: Tensor, dt: Tensor, noise_level: float, sigma_cap: Tensor
) -> tuple[Tensor, Tensor]:
    capped = torch.where(sigma == 1, sigma_cap, sigma)
    s = noise_level * torch.sqrt(sigma / (1 - capped))
    drift = s.square() / (2 * sigma)
    mean = x * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
    return mean, s * torch.sqrt(-dt)


def _cps(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
    x_0 = x - sigma * velocity
    eps = x + (1 - sigma) * velocity
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    # sigma_next^2 - std^2 may come out a rounding below zero at noise level 1.
    kept = (sigma_next.square() - std.square()).clamp_min(0)
    return (1 - sigma_next) * x_0 + torch.sqrt(kept) * eps, std


def _dance(x: Tensor, velocity: Tensor, sigma: Tensor, dt: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    x_0 = x - sigma * velocity
    score = -(x - (1 - sigma) * x_0) / sigma.square()
    return x + velocity * dt - 0.5 * eta**2 * score * dt, eta * torch.sqrt(-dt)


def _check(
    kind: str,
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float,
    sigma_cap: float | Tensor,
) -> None:
    check_kind(kind)
    if x.shape != velocity.shape:
        raise ValueError(
            f"x and velocity must have the same shape; received {tuple(x.shape)} and {tuple(velocity.shape)}."
        )
    highest = 1.0 if kind == "cps" else math.inf
    if not 0 <= noise_level <= highest:
        raise ValueError(f"noise_level for '{kind}' must lie in [0, {highest}], received {noise_level}.")
    if _on_host(sigma) and _on_host(sigma_next):
        now, after = torch.as_tensor(sigma), torch.as_tensor(sigma_next)
        if not bool(((now <= 1) & (after < now) & (after >= 0)).all()):
            raise ValueError(
                "A step goes down in noise: 0 <= sigma_next < sigma <= 1. "
                f"Received sigma={_show(sigma)}, sigma_next={_show(sigma_next)}."
            )
    if kind == "flow_sde" and _on_host(sigma_cap):
        cap = torch.as_tensor(sigma_cap)
        if not bool(((cap >= 0) & (cap < 1)).all()):
            raise ValueError(f"sigma_cap must be the schedule's second sigma, in [0, 1); received {_show(sigma_cap)}.")


def check_kind(kind: str) -> None:
    """Raise a ValueError that names the nearest kind unless `kind` is one of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"Unknown transition kind '{kind}'.{nearest(str(kind), KINDS)} Kinds: {', '.join(KINDS)}.")


def _on_host(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _show(value: float | Tensor) -> object:
    return value.tolist() if isinstance(value, Tensor) else value
