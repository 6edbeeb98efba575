"""Objectives against straightforward float64 evaluations, micro-batching, and where gradients go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flow_rl.flow.objectives import (
    clipped_policy_loss,
    guarded_policy_loss,
    kl_to_reference,
    nft_loss,
    step_weights,
    velocity_matching_loss,
)
from flow_rl.flow.transitions import transition

N, SHAPE = 6, (6, 4, 3)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


SIGMA = torch.tensor([0.95, 0.8, 0.6, 0.5, 0.3, 0.1])
ADVANTAGES = torch.tensor([1.5, -0.5, 0.0, 7.0, -9.0, -1.0])


# ---------------------------------------------------------------- clipped policy gradient


def test_clipped_loss_by_cases() -> None:
    ratio = torch.tensor([1.3, 0.7, 1.3, 0.7, 1.05], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    log_prob = ratio.log().float().requires_grad_()
    loss, metrics = clipped_policy_loss(log_prob, torch.zeros(5), advantages, clip_range=0.1)
    # By hand: positive rows may gain at most (1 + e) A; negative rows at most (1 - e) A.
    assert loss.item() == pytest.approx((-1.1 - 0.7 + 1.3 + 0.9 - 2.1) / 5, rel=1e-6)
    loss.backward()
    expected = torch.tensor([0.0, -0.7, 1.3, 0.0, -2.1]) / 5
    torch.testing.assert_close(log_prob.grad, expected)
    assert float(metrics["clip_fraction_high"]) == pytest.approx(0.2)
    assert float(metrics["clip_fraction_low"]) == pytest.approx(0.2)
    assert float(metrics["clip_fraction"]) == pytest.approx(0.4)
    assert float(metrics["ratio_mean"]) == pytest.approx(float(ratio.mean()), rel=1e-6)
    assert float(metrics["ratio_deviation_max"]) == pytest.approx(0.3, rel=1e-5)
    assert float(metrics["approx_kl"]) == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=1e-5)


def test_first_update_is_the_plain_policy_gradient() -> None:
    log_prob = normal(0, N).requires_grad_()
    loss, metrics = clipped_policy_loss(log_prob, log_prob, ADVANTAGES, clip_range=1e-4)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, -ADVANTAGES / N)
    assert metrics["ratio_deviation_max"] == 0
    assert metrics["clip_fraction"] == 0


def test_row_weights_scale_rows() -> None:
    log_prob = normal(0, N).requires_grad_()
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, 0.5])
    clipped_policy_loss(log_prob, log_prob, ADVANTAGES, clip_range=1e-4, weights=weights)[0].backward()
    torch.testing.assert_close(log_prob.grad, -ADVANTAGES * weights / N)


# ---------------------------------------------------------------- GRPO-Guard


def guarded_inputs(shift: float) -> tuple[Tensor, dict]:
    x, v_old, noise = normal(1), normal(2), normal(3)
    sigma_next = SIGMA - 0.05
    args = {"noise_level": 0.7, "sigma_cap": 0.95}
    old = transition("flow_sde", x, v_old, SIGMA, sigma_next, **args)
    x_next = old.sample(noise)
    velocity = (v_old + shift * normal(4)).requires_grad_()
    new = transition("flow_sde", x, velocity, SIGMA, sigma_next, **args)
    given = {
        "log_prob": new.log_prob(x_next),
        "log_prob_old": old.log_prob(x_next),
        "advantages": ADVANTAGES,
        "mean": new.mean,
        "mean_old": old.mean,
        "std": new.std,
        "dt": sigma_next - SIGMA,
    }
    return velocity, given


def test_guarded_ratio_is_the_mean_shift_along_the_noise() -> None:
    # With x_next = mean_old + std z, the re-centred log-ratio is mean((mean - mean_old) z) at any std.
    _, given = guarded_inputs(shift=3.0)
    shift = (given["mean"] - given["mean_old"]).detach().double()
    log_ratio = (shift * normal(3).double()).mean(dim=(1, 2))
    ratio = log_ratio.exp()
    a, e = ADVANTAGES.double(), 0.03
    rows = torch.maximum(-a * ratio, -a * ratio.clamp(1 - e, 1 + e)) / 0.05
    loss, metrics = guarded_policy_loss(**given, clip_range=e)
    torch.testing.assert_close(loss.double(), rows.mean(), rtol=2e-5, atol=0.0)
    assert float(metrics["ratio_mean"]) == pytest.approx(float(ratio.mean()), abs=1e-5)
    assert 0 < float(metrics["clip_fraction"]) < 1


def test_guarded_ratio_is_exactly_one_at_the_first_update() -> None:
    velocity, given = guarded_inputs(shift=0.0)
    loss, metrics = guarded_policy_loss(**given, clip_range=2e-6)
    assert metrics["ratio_deviation_max"] == 0
    loss.backward()
    assert torch.isfinite(velocity.grad).all()
    assert (velocity.grad[ADVANTAGES != 0].flatten(1).norm(dim=1) > 0).all()


# ---------------------------------------------------------------- DiffusionNFT


def nft_inputs(shift: float = 0.3) -> dict:
    x_0, eps = normal(5), normal(6)
    level = SIGMA.view(-1, 1, 1)
    old = eps - x_0 + 0.5 * normal(7)
    return {
        "velocity": old + shift * normal(8),
        "velocity_old": old,
        "x_t": (1 - level) * x_0 + level * eps,
        "x_0": x_0,
        "sigma": SIGMA,
        "advantages": ADVANTAGES,
    }


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_matches_a_row_by_row_evaluation(beta: float) -> None:
    given = nft_inputs()
    reference = normal(9)
    a_max, total = 5.0, 0.0
    for n in range(N):
        v, old, x_t, x_0, ref = (
            t[n].double() for t in (given["velocity"], given["velocity_old"], given["x_t"], given["x_0"], reference)
        )
        t = float(SIGMA[n])
        r = min(max(float(ADVANTAGES[n]), -a_max), a_max) / (2 * a_max) + 0.5
        for side, share in ((beta, r), (-beta, 1 - r)):
            error = (x_t - t * (old + side * (v - old))) - x_0
            total += a_max / beta * share * float(error.square().mean() / error.abs().mean())
        total += 1e-2 * float((v - ref).square().mean())
    loss, metrics = nft_loss(**given, beta=beta, advantage_max=a_max, velocity_ref=reference, kl_weight=1e-2)
    assert loss.item() == pytest.approx(total / N, rel=1e-5)
    assert float(metrics["positive_weight"]) == pytest.approx((0.65 + 0.45 + 0.5 + 1 + 0 + 0.4) / N)


def test_nft_pulls_to_good_samples_and_pushes_from_bad_ones() -> None:
    given = nft_inputs()
    velocity = given["velocity_old"].clone().requires_grad_()
    given["velocity"] = velocity
    nft_loss(**given, beta=1.0, advantage_max=5.0)[0].backward()
    target = (given["x_t"] - given["x_0"]) / SIGMA.view(-1, 1, 1)
    towards = (-velocity.grad * (target - velocity.detach())).sum(dim=(1, 2))
    assert (towards[ADVANTAGES > 0] > 0).all()
    assert (towards[ADVANTAGES < 0] < 0).all()
    assert towards[ADVANTAGES == 0].abs().max() < 1e-6 * towards.abs().max()


def test_nft_rows_of_weight_zero_are_as_good_as_absent() -> None:
    given, reference = nft_inputs(), normal(9)
    assert ADVANTAGES[2] == 0
    kept = torch.tensor([0, 3, 4])
    weights = torch.zeros(N).index_fill(0, kept, 1.0)
    settings = {"beta": 0.7, "advantage_max": 5.0, "kl_weight": 0.1, "denominator": len(kept)}

    def gradient(rows: torch.Tensor, **more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        some = {name: value[rows] for name, value in given.items()}
        some["velocity"] = some["velocity"].clone().requires_grad_()
        loss, _ = nft_loss(**some, velocity_ref=reference[rows], **settings, **more)
        return loss.detach(), torch.autograd.grad(loss, some["velocity"])[0]

    everyone = torch.arange(N)
    loss, found = gradient(everyone, weights=weights)
    expected_loss, expected = gradient(kept)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found[kept], expected)
    assert not found[weights == 0].any()
    # Advantage 0 alone would not do: away from the old policy such a row pulls back to it.
    _, unweighted = gradient(everyone)
    assert unweighted[2].norm() > 0.3 * unweighted[kept].flatten(1).norm(dim=1).min()


def test_nft_error_scale_is_a_constant() -> None:
    # The same value, with the scale written out as a number: the gradients must agree.
    given = nft_inputs()
    velocity = given["velocity"].double().requires_grad_()
    old, x_t, x_0 = (given[k].double() for k in ("velocity_old", "x_t", "x_0"))
    level, r = SIGMA.double().view(-1, 1, 1), ADVANTAGES.double().clamp(-5, 5) / 10 + 0.5
    loss = 0.0
    for side, share in ((1.0, r), (-1.0, 1 - r)):
        error = x_t - level * (old + side * (velocity - old)) - x_0
        scale = error.abs().mean(dim=(1, 2)).tolist()
        loss = loss + 5 * (share * error.square().mean(dim=(1, 2)) / torch.tensor(scale)).mean()
    (expected,) = torch.autograd.grad(loss, velocity)
    ours = given["velocity"].clone().requires_grad_()
    nft_loss(**(given | {"velocity": ours}), beta=1.0, advantage_max=5.0)[0].backward()
    torch.testing.assert_close(ours.grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_nft_survives_a_perfect_prediction() -> None:
    given = nft_inputs()
    exact = (given["x_t"] - given["x_0"]) / SIGMA.view(-1, 1, 1)
    velocity = exact.clone().requires_grad_()
    loss, _ = nft_loss(**(given | {"velocity": velocity, "velocity_old": exact}), beta=1.0, advantage_max=5.0)
    loss.backward()
    assert torch.isfinite(velocity.grad).all()


# ---------------------------------------------------------------- velocity matching, KL


def test_velocity_matching_is_zero_at_the_teacher_and_the_mse_elsewhere() -> None:
    teacher, student = normal(0), normal(1).requires_grad_()
    assert velocity_matching_loss(teacher, teacher)[0] == 0
    loss, metrics = velocity_matching_loss(student, teacher)
    loss.backward()
    difference = student.detach().double() - teacher.double()
    assert loss.item() == pytest.approx(float(difference.square().mean()), rel=1e-6)
    torch.testing.assert_close(student.grad.double(), 2 * difference / difference.numel(), rtol=1e-5, atol=1e-8)
    expected = (difference.square().mean() / teacher.double().square().mean()).sqrt()
    assert float(metrics["relative_error"]) == pytest.approx(float(expected), rel=1e-5)


def test_kl_equals_the_normal_kl_a_dimension() -> None:
    mean, mean_ref, std = normal(0), normal(1), torch.linspace(0.1, 1.0, N)
    column = std.view(-1, 1, 1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, column), torch.distributions.Normal(mean_ref, column)
    ).mean(dim=(1, 2))
    torch.testing.assert_close(kl_to_reference(mean, mean_ref, std), expected)
    torch.testing.assert_close(kl_to_reference(mean, mean_ref, column), expected)


# ---------------------------------------------------------------- what all of them promise


def clipped(rows: slice, velocity: Tensor, denominator: int | None) -> Tensor:
    log_prob = velocity[rows].mean(dim=(1, 2))
    return clipped_policy_loss(
        log_prob, torch.zeros_like(log_prob), ADVANTAGES[rows], clip_range=0.1, denominator=denominator
    )[0]


def guarded(rows: slice, velocity: Tensor, denominator: int | None) -> Tensor:
    log_prob = velocity[rows].mean(dim=(1, 2))
    return guarded_policy_loss(
        log_prob,
        torch.zeros_like(log_prob),
        ADVANTAGES[rows],
        mean=velocity[rows],
        mean_old=normal(3)[rows],
        std=SIGMA[rows],
        dt=-0.1 * SIGMA[rows],
        clip_range=0.1,
        denominator=denominator,
    )[0]


def nft(rows: slice, velocity: Tensor, denominator: int | None) -> Tensor:
    given = {k: v[rows] for k, v in nft_inputs().items()} | {"velocity": velocity[rows]}
    return nft_loss(**given, beta=0.5, advantage_max=5.0, denominator=denominator)[0]


def matching(rows: slice, velocity: Tensor, denominator: int | None) -> Tensor:
    return velocity_matching_loss(velocity[rows], normal(3)[rows], denominator=denominator)[0]


@pytest.mark.parametrize("objective", [clipped, guarded, nft, matching])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_sum_to_the_whole(
    objective: Callable[[slice, Tensor, int | None], Tensor], micro_batch: int
) -> None:
    whole, parts = normal(2).requires_grad_(), normal(2).requires_grad_()
    loss = objective(slice(None), whole, None)
    loss.backward()
    total = 0.0
    for start in range(0, N, micro_batch):
        part = objective(slice(start, start + micro_batch), parts, N)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-8)


def test_constants_get_no_gradient_and_metrics_carry_none() -> None:
    given = {k: v.clone().requires_grad_() for k, v in nft_inputs().items()}
    reference = normal(9).requires_grad_()
    loss, metrics = nft_loss(**given, beta=1.0, advantage_max=5.0, velocity_ref=reference, kl_weight=0.1)
    loss.backward()
    assert {k for k, v in given.items() if v.grad is not None} == {"velocity"}
    assert reference.grad is None
    assert all(not m.requires_grad and m.ndim == 0 for m in metrics.values())
    old, advantages, log_prob = normal(0, N), normal(1, N), normal(2, N)
    for t in (old, advantages, log_prob):
        t.requires_grad_()
    loss, metrics = clipped_policy_loss(log_prob, old, advantages, clip_range=0.1)
    loss.backward()
    assert log_prob.grad is not None
    assert old.grad is advantages.grad is None
    assert all(not m.requires_grad and m.ndim == 0 for m in metrics.values())


def test_bfloat16_input_is_computed_in_float32() -> None:
    a, b = normal(0).bfloat16(), normal(1).bfloat16()
    low, high = velocity_matching_loss(a, b)[0], velocity_matching_loss(a.float(), b.float())[0]
    assert low.dtype == torch.float32
    assert torch.equal(low, high)


def test_bad_input_is_explained() -> None:
    rows = torch.zeros(N)
    with pytest.raises(ValueError, match=r"log_prob_old must have shape \(6,\), received \(6, 1\)"):
        clipped_policy_loss(rows, rows.view(-1, 1), rows, clip_range=0.1)
    with pytest.raises(ValueError, match=r"one value a row"):
        clipped_policy_loss(rows.view(-1, 1), rows, rows, clip_range=0.1)
    with pytest.raises(ValueError, match="clip_range must be above 0"):
        clipped_policy_loss(rows, rows, rows, clip_range=0.0)
    with pytest.raises(ValueError, match="denominator must be above 0"):
        clipped_policy_loss(rows, rows, rows, clip_range=0.1, denominator=0)
    with pytest.raises(ValueError, match="needs velocity_ref"):
        nft_loss(**nft_inputs(), beta=1.0, advantage_max=5.0, kl_weight=1e-4)
    with pytest.raises(ValueError, match="beta must be above 0"):
        nft_loss(**nft_inputs(), beta=0.0, advantage_max=5.0)
    with pytest.raises(ValueError, match="velocity_target must have shape"):
        velocity_matching_loss(normal(0), normal(0)[:3])


def test_step_weights_are_relative_to_their_mean() -> None:
    assert step_weights(torch.tensor([0.3, 0.1, 0.2])).tolist() == pytest.approx([1.5, 0.5, 1.0])
    assert step_weights(torch.tensor([7.0])).tolist() == [1.0]
    with pytest.raises(ValueError, match="stochastic steps"):
        step_weights(torch.tensor([0.3, 0.0]))
