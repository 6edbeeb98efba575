"""Rollouts against a Gaussian whose velocity is known, and against their own replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flow_rl.flow.noise import Stream, batch_noise
from flow_rl.flow.rollout import rollout
from flow_rl.flow.transitions import transition

MEAN, STD = 1.5, 0.5
SIGMAS = torch.linspace(1.0, 0.0, 41)
STOCHASTIC = [("flow_sde", 0.7), ("cps", 0.8), ("dance", 0.3)]


def gaussian_velocity(x: Tensor, _i: int, t: float) -> Tensor:
    """The exact velocity where the data are N(MEAN, STD^2)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x - (1 - t) * MEAN
    x_0 = MEAN + (1 - t) * STD**2 / variance * centred
    return t / variance * centred - x_0


def start_noise(rows: int = 4, *shape: int) -> Tensor:
    return torch.randn(rows, *(shape or (6, 5)), generator=torch.Generator().manual_seed(0))


def step_noise(i: int) -> Tensor:
    return batch_noise((6, 5), seed=1, step=0, ids=[3, 3, 8, 8], members=[0, 1, 0, 1], stream=Stream.STEP, index=i)


@pytest.mark.parametrize(
    ("kind", "noise", "steps", "std"),
    [
        ("ode", 0.0, 0, 0.4818),
        ("flow_sde", 0.7, 40, 0.4974),
        ("cps", 0.8, 40, 0.3861),
        ("dance", 0.3, 40, 0.4846),
        ("flow_sde", 0.7, 4, 0.5075),
        ("cps", 0.8, 4, 0.4815),
        ("dance", 0.3, 4, 0.4819),
    ],
)
def test_output_spread_on_a_gaussian(kind: str, noise: float, steps: int, std: float) -> None:
    # What each sampler leaves of the data's 0.500 after 40 steps without shift, from the scalar recursion
    # var <- a^2 var + std^2 in float64. Every step is affine in the noises: one row a noise gives its
    # coefficient, and their squares add up to the variance, without sampling error.
    impulses = torch.cat([torch.zeros(1, 41), torch.eye(41)]).unsqueeze(-1)
    out = rollout(
        gaussian_velocity,
        impulses[:, 0],
        SIGMAS,
        kind=kind,
        noise_level=noise,
        stochastic_steps=range(steps),
        step_noise=lambda i: impulses[:, i + 1],
    ).latents.flatten()
    assert float((out[1:] - out[0]).double().norm()) == pytest.approx(std, abs=1e-4)
    assert float(out[0]) == pytest.approx(MEAN, abs=5e-3)


def test_fine_ode_reaches_the_exact_solution() -> None:
    # The flow of a Gaussian is affine: x_0 = m + s0 eps.
    x = start_noise()
    out = rollout(gaussian_velocity, x, torch.linspace(1, 0, 401)).latents
    torch.testing.assert_close(out, MEAN + STD * x, rtol=0.0, atol=1e-2)


@pytest.mark.parametrize(("kind", "noise"), STOCHASTIC)
@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_replay_of_the_stored_steps_gives_ratio_one(
    kind: str, noise: float, store_dtype: torch.dtype | None, micro_batch: int
) -> None:
    trajectory = rollout(
        gaussian_velocity,
        start_noise(),
        SIGMAS,
        kind=kind,
        noise_level=noise,
        stochastic_steps=(2, 5, 9),
        step_noise=step_noise,
        store_dtype=store_dtype,
    )
    assert trajectory.steps == (2, 5, 9)
    assert trajectory.states.dtype == trajectory.next_states.dtype == (store_dtype or torch.float32)
    for s, i in enumerate(trajectory.steps):
        sigma, sigma_next = float(SIGMAS[i]), float(SIGMAS[i + 1])

        def replay(rows: slice, s: int = s, i: int = i, now: float = sigma, after: float = sigma_next) -> Tensor:
            x = trajectory.states[s, rows].float()
            step = transition(
                kind,
                x,
                gaussian_velocity(x, i, now),
                now,
                after,
                noise_level=noise,
                sigma_cap=float(SIGMAS[1]),
            )
            # The stored value is the drawn one: sampling again with the same noise lands on it.
            again = step.sample(step_noise(i)[rows]).to(trajectory.next_states.dtype)
            assert torch.equal(again, trajectory.next_states[s, rows])
            return step.log_prob(trajectory.next_states[s, rows])

        for first in range(0, 4, micro_batch):
            rows = slice(first, first + micro_batch)
            assert torch.equal(torch.exp(replay(rows) - replay(rows)), torch.ones(len(range(4)[rows])))


@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16])
def test_recorded_states_chain(store_dtype: torch.dtype | None) -> None:
    trajectory = rollout(
        gaussian_velocity,
        start_noise(),
        SIGMAS,
        kind="flow_sde",
        noise_level=0.7,
        stochastic_steps=(0, 1, 2),
        step_noise=step_noise,
        record_all=True,
        store_dtype=store_dtype,
    )
    assert trajectory.steps == tuple(range(40))
    assert torch.equal(trajectory.states[1:], trajectory.next_states[:-1])
    assert torch.equal(trajectory.next_states[-1].float(), trajectory.latents)


@pytest.mark.parametrize(("kind", "noise"), STOCHASTIC)
def test_no_noise_is_the_ode(kind: str, noise: float) -> None:
    ode = rollout(gaussian_velocity, start_noise(), SIGMAS)
    still = rollout(
        gaussian_velocity,
        start_noise(),
        SIGMAS,
        kind=kind,
        noise_level=0.0,
        stochastic_steps=range(40),
        step_noise=step_noise,
    )
    assert torch.equal(ode.latents, still.latents)
    noisy = rollout(
        gaussian_velocity,
        start_noise(),
        SIGMAS,
        kind=kind,
        noise_level=noise,
        stochastic_steps=(3,),
        step_noise=step_noise,
    )
    assert not torch.allclose(ode.latents, noisy.latents, atol=1e-3)
    assert ode.steps == ()
    assert ode.states.shape == ode.next_states.shape == (0, 4, 6, 5)


def test_two_parts_make_the_whole_with_a_shared_prefix() -> None:
    prompts = start_noise(2)
    args = {"kind": "cps", "noise_level": 0.8, "stochastic_steps": (4, 6), "step_noise": step_noise}
    whole = rollout(gaussian_velocity, prompts.repeat_interleave(2, 0), SIGMAS, **args)
    prefix = rollout(gaussian_velocity, prompts, SIGMAS, stop=4, **args)
    assert prefix.steps == ()
    rest = rollout(gaussian_velocity, prefix.latents.repeat_interleave(2, 0), SIGMAS, start=4, **args)
    assert torch.equal(whole.latents, rest.latents)
    assert torch.equal(whole.states, rest.states)


def test_callback_sees_each_step_once_with_its_sigma() -> None:
    seen: list[tuple[int, float]] = []

    def velocity(x: Tensor, i: int, sigma: float) -> Tensor:
        seen.append((i, sigma))
        return torch.zeros_like(x)

    rollout(velocity, start_noise(), SIGMAS, start=1, stop=4)
    assert seen == [(i, float(SIGMAS[i])) for i in (1, 2, 3)]


def test_gradient_only_on_request() -> None:
    scale = torch.ones((), requires_grad=True)

    def velocity(x: Tensor, i: int, sigma: float) -> Tensor:
        return scale * gaussian_velocity(x, i, sigma)

    assert not rollout(velocity, start_noise(), SIGMAS).latents.requires_grad
    rollout(velocity, start_noise(), SIGMAS, enable_grad=True).latents.sum().backward()
    assert scale.grad.abs() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "flow_sed"}, "Did you mean 'flow_sde'"),
        ({"stochastic_steps": (40,)}, r"\[40\] lie outside .* 0 to 39"),
        ({"kind": "ode"}, "stochastic kind"),
        ({"step_noise": None}, "need step_noise"),
        ({"start": 5, "stop": 3}, "start=5, stop=3"),
        ({"sigmas": SIGMAS.flip(0)}, "must descend"),
        ({"sigmas": torch.ones(1)}, r"shape \(1,\)"),
    ],
)
def test_bad_input_is_explained(change: dict, message: str) -> None:
    given = {
        "sigmas": SIGMAS,
        "kind": "flow_sde",
        "noise_level": 0.7,
        "stochastic_steps": (1,),
        "step_noise": step_noise,
    }
    given |= change
    with pytest.raises(ValueError, match=message):
        rollout(gaussian_velocity, start_noise(), given.pop("sigmas"), **given)
