"""Transitions against published vectors, float64 closed forms and torch.distributions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flow_rl.flow.transitions import KINDS, transition

CASES = json.loads((Path(__file__).parent / "data" / "transitions.json").read_text())
STOCHASTIC = [("flow_sde", 0.7), ("cps", 0.8), ("dance", 0.3)]


def batch(rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, rows, 16, 12, generator=generator)
    return x.to(dtype), v.to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['kind']}-{c['noise_level']}-{c['sigma']:.3f}")
@pytest.mark.parametrize("per_row", [False, True])
def test_matches_published_code(case: dict, per_row: bool) -> None:
    shape = case["shape"]
    x, v, x_next, mean = (torch.tensor(case[k]).view(shape) for k in ("x", "velocity", "x_next", "mean"))
    sigma, sigma_next = case["sigma"], case["sigma_next"]
    if per_row:
        sigma, sigma_next = torch.full((shape[0],), sigma), torch.full((shape[0],), sigma_next)
    step = transition(
        case["kind"],
        x,
        v,
        sigma,
        sigma_next,
        noise_level=case["noise_level"],
        sigma_cap=case["sigma_first_below_one"],
    )
    torch.testing.assert_close(step.mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.std, torch.tensor(case["std"]).expand_as(step.std), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(step.log_prob(x_next), torch.tensor(case["log_prob"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.9, 0.8), (0.5, 0.35), (0.1, 0.0)])
@pytest.mark.parametrize(("kind", "noise"), [("flow_sde", 0.7), ("flow_sde", 1.2), ("dance", 0.3)])
def test_mean_is_the_euler_maruyama_expansion(kind: str, noise: float, sigma: float, sigma_next: float) -> None:
    # Any SDE with the ODE's marginals has drift v - g^2/2 score, and score = -eps_hat / sigma.
    x, v = (t.double() for t in batch())
    dt = sigma_next - sigma
    g = noise * math.sqrt(sigma / (1 - sigma)) if kind == "flow_sde" else noise
    score = -(x + (1 - sigma) * v) / sigma
    expected = x + (v - 0.5 * g**2 * score) * dt
    step = transition(kind, x, v, sigma, sigma_next, noise_level=noise, sigma_cap=0.99)
    torch.testing.assert_close(step.mean.double(), expected, rtol=1e-5, atol=1e-5)
    assert float(step.std) == pytest.approx(g * math.sqrt(-dt), rel=1e-5)


def test_first_step_takes_the_cap() -> None:
    x, v = batch()
    step = transition("flow_sde", x, v, 1.0, 0.9, noise_level=0.7, sigma_cap=0.9)
    assert float(step.std) == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1), rel=1e-5)


@pytest.mark.parametrize(("kind", "noise"), [("flow_sde", 0.7), ("dance", 0.3)])
def test_log_prob_is_the_mean_normal_log_density(kind: str, noise: float) -> None:
    x, v = batch()
    step = transition(kind, x, v, 0.8, 0.7, noise_level=noise, sigma_cap=0.95)
    x_next = step.sample(torch.randn_like(x))
    normal = torch.distributions.Normal(step.mean.double(), step.std.double())
    expected = normal.log_prob(x_next.double()).mean(dim=(1, 2))
    torch.testing.assert_close(step.log_prob(x_next).double(), expected, rtol=1e-5, atol=1e-6)


def test_cps_keeps_the_noise_budget() -> None:
    # Whatever the noise level, fresh and kept noise together have variance sigma_next^2.
    x, v = (t.double() for t in batch())
    sigma, sigma_next = 0.8, 0.6
    x_0, eps = x - sigma * v, x + (1 - sigma) * v
    for noise in (0.1, 0.5, 1.0):
        step = transition("cps", x, v, sigma, sigma_next, noise_level=noise, sigma_cap=0.95)
        kept = ((step.mean.double() - (1 - sigma_next) * x_0) * eps).sum() / eps.square().sum()
        assert float(kept**2 + step.std.double() ** 2) == pytest.approx(sigma_next**2, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_level_zero_is_the_ode(kind: str) -> None:
    x, v = batch()
    step = transition(kind, x, v, 0.8, 0.7, noise_level=0.0, sigma_cap=0.95)
    noise = torch.randn_like(x)
    euler = x + v * (torch.tensor(0.7) - torch.tensor(0.8))
    assert torch.equal(step.sample(noise), euler)
    assert torch.equal(step.std, torch.zeros(()))
    with pytest.raises(ValueError, match="deterministic"):
        step.log_prob(x)


@pytest.mark.parametrize(("kind", "_noise"), STOCHASTIC)
def test_vanishing_noise_approaches_the_ode(kind: str, _noise: float) -> None:
    # Not the shortcut at exactly 0: the formulas themselves must lead there.
    x, v = batch()
    step = transition(kind, x, v, 0.8, 0.7, noise_level=1e-4, sigma_cap=0.95)
    torch.testing.assert_close(step.mean, x + v * (0.7 - 0.8), rtol=1e-5, atol=1e-6)
    assert 0 < float(step.std) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "noise"), STOCHASTIC)
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_ratio_is_exactly_one(kind: str, noise: float, dtype: torch.dtype, micro_batch: int) -> None:
    x, v = batch(dtype=dtype)
    sigma = torch.tensor([1.0, 0.95, 0.9, 0.8, 0.7, 0.6])
    sigma_next = sigma - 0.05

    def step(rows: slice) -> object:
        return transition(kind, x[rows], v[rows], sigma[rows], sigma_next[rows], noise_level=noise, sigma_cap=0.95)

    stored = step(slice(None)).sample(torch.randn(x.shape)).to(dtype)
    rows = [slice(i, i + micro_batch) for i in range(0, len(x), micro_batch)]
    old = [step(r).log_prob(stored[r]) for r in rows]
    new = [step(r).log_prob(stored[r]) for r in rows]
    ratio = torch.cat([torch.exp(a - b) for a, b in zip(new, old, strict=True)])
    assert torch.equal(ratio, torch.ones(6))
    whole = step(slice(None)).log_prob(stored)
    torch.testing.assert_close(torch.cat(old), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "noise"), STOCHASTIC)
def test_number_and_per_row_sigmas_agree_bit_for_bit(kind: str, noise: float) -> None:
    x, v = batch()
    args = {"noise_level": noise, "sigma_cap": 0.95}
    one = transition(kind, x, v, 0.8, 0.7, **args)
    rows = transition(kind, x, v, torch.full((6,), 0.8), torch.full((6,), 0.7), **args)
    assert torch.equal(one.mean, rows.mean)
    assert torch.equal(one.log_prob(x), rows.log_prob(x))


def test_bfloat16_input_is_computed_in_float32() -> None:
    x, v = batch(dtype=torch.bfloat16)
    low = transition("flow_sde", x, v, 0.8, 0.7, noise_level=0.7, sigma_cap=0.95)
    high = transition("flow_sde", x.float(), v.float(), 0.8, 0.7, noise_level=0.7, sigma_cap=0.95)
    assert low.mean.dtype == low.std.dtype == low.sample(x).dtype == torch.float32
    assert torch.equal(low.mean, high.mean)


def test_gradient_reaches_the_velocity() -> None:
    x, v = batch()
    v.requires_grad_()
    step = transition("flow_sde", x, v, 0.8, 0.7, noise_level=0.7, sigma_cap=0.95)
    x_next = step.sample(torch.randn_like(x)).detach()
    step.log_prob(x_next).sum().backward()
    d_mean = (0.7 - 0.8) * (1 + 0.49 * (0.8 / 0.2) * 0.2 / (2 * 0.8))
    expected = (x_next - step.mean.detach()) / float(step.std) ** 2 * d_mean / (16 * 12)
    torch.testing.assert_close(v.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "flow_sd"}, "Did you mean 'flow_sde'"),
        ({"kind": "FLOW-SDE"}, "Kinds: ode, flow_sde, cps, dance"),
        ({"sigma_next": 0.8}, "sigma_next < sigma"),
        ({"sigma_next": torch.full((6,), 0.9)}, "sigma_next < sigma"),
        ({"sigma": 1.2}, "sigma <= 1"),
        ({"sigma": torch.full((5,), 0.8)}, r"shape \(6,\)"),
        ({"noise_level": -0.1}, "noise_level"),
        ({"kind": "cps", "noise_level": 1.5}, r"\[0, 1.0\]"),
        ({"velocity": torch.zeros(6, 16, 11)}, "same shape"),
        ({"sigma_cap": 1.0}, "second sigma"),
    ],
)
def test_bad_input_is_explained(change: dict, message: str) -> None:
    x, v = batch()
    given = {
        "kind": "flow_sde",
        "velocity": v,
        "sigma": 0.8,
        "sigma_next": 0.7,
        "noise_level": 0.7,
        "sigma_cap": 0.9,
    }
    given |= change
    positional = [given.pop(k) for k in ("kind", "velocity", "sigma", "sigma_next")]
    with pytest.raises(ValueError, match=message):
        transition(positional[0], x, *positional[1:], **given)
