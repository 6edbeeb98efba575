"""Which states are trained and what they count, against the transitions themselves; and the bound the loss rests on."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from flow_rl.flow.objectives import kl_to_reference, velocity_matching_loss
from flow_rl.flow.rollout import rollout
from flow_rl.flow.states import choose_states, kl_weights
from flow_rl.flow.transitions import transition


def schedule(steps: int, shift: float = 3.0) -> Tensor:
    levels = torch.linspace(1, 0, steps + 1)
    return shift * levels / (1 + (shift - 1) * levels)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_states_without_a_draw() -> None:
    assert choose_states(schedule(5)) == (0, 1, 2, 3, 4)
    assert choose_states(schedule(5), 5, bias=-3.0) == (0, 1, 2, 3, 4)


def test_a_draw_is_ascending_without_repeats_and_repeatable() -> None:
    for seed in range(20):
        drawn = choose_states(schedule(10), 4, bias=1.0, generator=generator(seed))
        assert list(drawn) == sorted(set(drawn))
        assert len(drawn) == 4
        assert drawn == choose_states(schedule(10), 4, bias=1.0, generator=generator(seed))


@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.5])
def test_one_state_is_drawn_in_proportion_to_the_biased_level(bias: float) -> None:
    sigmas, draws, g = schedule(4), 4000, generator()
    found = Counter(choose_states(sigmas, 1, bias=bias, generator=g)[0] for _ in range(draws))
    weights = [float(s) ** bias for s in sigmas[:-1]]
    for index, weight in enumerate(weights):
        share = weight / sum(weights)
        assert found[index] / draws == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / draws))


def test_more_states_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 5 states"):
        choose_states(schedule(5), 6)


@pytest.mark.parametrize(("kind", "level"), [("flow_sde", 0.7), ("dance", 0.3)])
def test_kl_weight_times_the_squared_error_is_the_kl_of_the_transitions(kind: str, level: float) -> None:
    sigmas, g = schedule(6), generator(1)
    weights = kl_weights(sigmas, kind=kind, noise_level=level)
    for n in range(6):
        x, v, teacher = (torch.randn(3, 7, generator=g) for _ in range(3))
        steps = [
            transition(kind, x, u, sigmas[n], sigmas[n + 1], noise_level=level, sigma_cap=sigmas[1])
            for u in (v, teacher)
        ]
        expected = kl_to_reference(steps[0].mean, steps[1].mean, steps[0].std).mean()
        loss, _ = velocity_matching_loss(v, teacher, weights=weights[n].expand(3))
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_kl_of_a_step_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        kl_weights(schedule(4), kind="cps", noise_level=0.5)  # its last step is deterministic


class Gaussian:
    """The exact velocity of data N(mean, std^2), affine in x: `v = slope (x - (1-t) mean) - mean`."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def slope(self, t: float) -> float:
        return (t - (1 - t) * self.std**2) / ((1 - t) ** 2 * self.std**2 + t**2)

    def __call__(self, x: Tensor, _index: int, t: float) -> Tensor:
        return self.slope(t) * (x - (1 - t) * self.mean) - self.mean


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (Gaussian(0.0, 1.0), Gaussian(1.5, 0.5)),
        (Gaussian(1.5, 0.5), Gaussian(0.0, 1.0)),
        (Gaussian(1.0, 0.5), Gaussian(1.5, 0.5)),
        (Gaussian(0.3, 0.2), Gaussian(0.3, 0.8)),
        (Gaussian(-1.0, 2.0), Gaussian(1.0, 0.3)),
    ],
)
def test_the_matched_loss_bounds_the_wasserstein_distance(student: Gaussian, teacher: Gaussian) -> None:
    """W2 <= (int E ||dv||^2 dt)^(1/2) exp(int L dt): states of the student, Lipschitz constant of the teacher.

    arXiv 2606.27608, appendix. Two Gaussians have W2^2 = (difference of means)^2 + (difference of stds)^2.
    """
    sigmas = torch.linspace(1, 0, 401)
    noise = torch.randn(20_000, 1, generator=generator(2))
    path = rollout(student, noise, sigmas, record_all=True)
    loss = lipschitz = 0.0
    for n, x in enumerate(path.states):
        t, dt = float(sigmas[n]), float(sigmas[n] - sigmas[n + 1])
        loss += dt * float(velocity_matching_loss(student(x, n, t), teacher(x, n, t))[0])
        lipschitz += dt * abs(teacher.slope(t))
    distance = math.hypot(student.mean - teacher.mean, student.std - teacher.std)
    # Maps of one noise by increasing functions are the optimal coupling in one dimension: measured, it is W2.
    measured = (path.latents - rollout(teacher, noise, sigmas).latents).square().mean().sqrt()
    assert float(measured) == pytest.approx(distance, rel=0.03)
    bound = math.sqrt(loss) * math.exp(lipschitz)
    assert distance <= bound
    assert bound < 12 * distance  # and it says something
