"""What must hold to the last bit, or to float tolerance, inside one GRPO iteration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flow_rl.batches import Prompts
from flow_rl.flow.windows import WindowSettings
from flow_rl.rl.objectives import Rollout
from lightning_modules import GRPOPolicy

BATCH = Prompts(
    ids=(11, 12),
    texts=("a portrait of a person with red hair", "a red pot"),  # of different length
    categories=("portrait", "plant"),
)


def rolled_out(module: GRPOPolicy) -> Rollout:
    module.configure_model()
    module.model.transformer.train()
    return module.roll_out(BATCH)


def gradients(module: GRPOPolicy, rollout: Rollout, advantages: torch.Tensor) -> list[torch.Tensor]:
    module.manual_backward = lambda loss: loss.backward()
    module.zero_grad()
    module.accumulate_gradients(rollout, advantages, module.prepare(rollout, 0))
    return [p.grad.clone() for p in module.model.transformer.parameters() if p.grad is not None]


def test_ratio_leaves_one_after_an_update(policy) -> None:
    module = policy("clipped", objective={"updates": 2})
    rollout = rolled_out(module)
    prepared = module.prepare(rollout, 0)
    with torch.no_grad():
        module.model.transformer.proj_out.weight.mul_(1.01)
    module.manual_backward = lambda loss: loss.backward()
    metrics = module.accumulate_gradients(rollout, torch.linspace(-1, 1, 6), prepared)
    assert float(metrics["ratio_deviation_max"]) > 1e-4


@pytest.mark.parametrize("kind", ["clipped", "guarded", "nft"])
def test_gradients_do_not_depend_on_the_micro_batch(policy: Callable[..., GRPOPolicy], kind: str) -> None:
    found = []
    for size in (1, 4, 64):
        settings = {} if kind == "nft" else {"clip_range": 0.1}
        module = policy(kind, objective={"micro_batch_size": size} | settings)
        rollout = rolled_out(module)
        found.append(gradients(module, rollout, torch.tensor([1.0, -0.5, -0.5, 0.3, 0.9, -1.2])))
    assert sum(g.square().sum() for g in found[0]) > 0
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()) + 1e-10)


@pytest.mark.parametrize("shared", [False, True])
def test_samples_do_not_depend_on_the_rollout_batch(policy, shared: bool) -> None:
    found = []
    for size in (3, 128):
        module = policy("clipped", rollout={"batch_size": size, "shared_noise": shared})
        found.append(rolled_out(module).trajectory)
    assert found[0].steps == found[1].steps
    for name in ("latents", "states", "next_states"):
        a, b = getattr(found[0], name), getattr(found[1], name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_shared_noise_gives_every_member_the_same_first_state(policy) -> None:
    rollout = rolled_out(policy("clipped", rollout={"shared_noise": True}))
    first = rollout.trajectory.states[0].unflatten(0, (2, 3))
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert (rollout.images.unflatten(0, (2, 3)).std(dim=1) > 0).any()  # and then they part


def test_noise_differs_between_iterations_members_and_prompts(policy) -> None:
    module = policy("nft")
    first = rolled_out(module).trajectory.latents
    module.iteration = 1
    second = rolled_out(module).trajectory.latents
    everything = torch.cat([first, second])
    distances = torch.cdist(everything.flatten(1), everything.flatten(1)) + torch.eye(12) * 1e3
    assert float(distances.min()) > 1e-3


@pytest.mark.parametrize("kind", ["clipped", "nft"])
def test_no_unconditional_forward_in_the_update_under_hybrid_guidance(policy, monkeypatch, kind: str) -> None:
    """Counted: every row that the update evaluates carries its own prompt's embedding, never the blank one."""
    module = policy(kind)
    rollout = rolled_out(module)
    blank = module.model.encode([""]).embeds[0]
    rows: list[torch.Tensor] = []
    forward = module.model.transformer.forward

    def counted(*args, encoder_hidden_states: torch.Tensor, **kwargs):
        rows.extend(encoder_hidden_states.unbind())
        return forward(*args, encoder_hidden_states=encoder_hidden_states, **kwargs)

    monkeypatch.setattr(module.model.transformer, "forward", counted)
    gradients(module, rollout, torch.ones(6))
    assert len(rows) >= 6
    assert not any(row.shape == blank.shape and torch.equal(row, blank) for row in rows)


def test_guidance_in_both_does_evaluate_the_blank_prompt(policy, monkeypatch) -> None:
    module = policy("clipped", rollout={"cfg": "both"})
    rollout = rolled_out(module)
    blank = module.model.encode([""]).embeds[0]
    seen = []
    forward = module.model.transformer.forward

    def counted(*args, encoder_hidden_states: torch.Tensor, **kwargs):
        seen.extend(r.shape == blank.shape and torch.equal(r, blank) for r in encoder_hidden_states)
        return forward(*args, encoder_hidden_states=encoder_hidden_states, **kwargs)

    monkeypatch.setattr(module.model.transformer, "forward", counted)
    gradients(module, rollout, torch.ones(6))
    assert any(seen)
    assert not all(seen)


def test_nft_gradient_is_zero_without_advantages_at_the_old_policy(policy) -> None:
    """At v == v_old the two branches' errors are equal, so r = 1/2 leaves nothing (the reference term is 0 too)."""
    module = policy("nft")
    rollout = rolled_out(module)
    still = gradients(module, rollout, torch.zeros(6))
    moving = gradients(module, rollout, torch.tensor([1.0, -0.5, -0.5, 0.3, 0.9, -1.2]))
    assert max(float(g.abs().max()) for g in still) < 1e-6 * max(float(g.abs().max()) for g in moving)


@pytest.mark.parametrize(
    ("window", "reached"),
    [
        (WindowSettings(count=2, fraction=0.5), {0, 1, 2, 3}),
        (WindowSettings(kind="low_noise", count=3, fraction=0.5), {4, 5, 6, 7}),
        (WindowSettings(kind="sliding", count=2, every=1), {4, 5}),
        (WindowSettings(kind="all"), set(range(8))),  # the last step too
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_nft_trains_at_the_noise_levels_of_its_own_rollout(policy, window, reached) -> None:
    module = policy("nft", rollout={"num_steps": 8, "window": window}, objective={"common_noise": False})
    module.iteration = 4
    rollout = rolled_out(module)
    schedule = rollout.sigmas.tolist()
    drawn = [module.objective.draws(rollout, update)[0] for update in range(6)]
    assert all(len(levels) == module.objective.pairs_per_sample(rollout.settings) for levels in drawn)
    for sample in torch.cat(drawn, dim=1).T.tolist():  # one row an image and update
        steps = [schedule.index(level) for level in sample]  # exactly a level of the schedule
        assert steps == sorted(set(steps))
        assert set(steps) <= reached
    seen = {schedule.index(level) for levels in drawn for level in levels.flatten().tolist()}
    assert seen == reached
    if window.kind in ("high_noise", "low_noise"):
        assert not torch.equal(drawn[0], drawn[1])  # another update draws anew
        assert len(set(map(tuple, drawn[0].T.tolist()))) > 1  # and so does another image


def test_a_samples_levels_do_not_depend_on_the_others(policy) -> None:
    module = policy("nft", rollout={"num_steps": 8}, objective={"common_noise": False})
    both = rolled_out(module)
    alone = module.roll_out(BATCH.select([1]))
    for whole, part in zip(module.objective.draws(both, 0), module.objective.draws(alone, 0), strict=True):
        torch.testing.assert_close(whole[:, 3:], part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("common", [True, False])
def test_common_noise_is_shared_in_a_group_and_nowhere_else(policy, common: bool) -> None:
    module = policy("nft", rollout={"num_steps": 8}, objective={"common_noise": common})
    rollout = rolled_out(module)
    sigma, x_t = module.objective.draws(rollout, update=0)
    level = sigma[0][:, None, None]
    noise = (x_t[0] - (1 - level) * rollout.trajectory.latents) / level
    groups, levels = noise.unflatten(0, (2, 3)), sigma[0].unflatten(0, (2, 3))
    same = torch.allclose(groups, groups[:, :1].expand_as(groups), atol=1e-4)
    assert same is common
    assert bool((levels == levels[:, :1]).all()) is common
    assert not torch.allclose(groups[0], groups[1], atol=1e-2)


def test_on_policy_nft_gives_the_gradient_of_a_fresh_old_policy_without_its_forward(policy) -> None:
    advantages, found, forwards = torch.tensor([1.0, -0.5, -0.5, 0.3, 0.9, -1.2]), [], []
    for decay in (0.0, 0.5):  # at the first iteration both old policies are the policy itself
        module = policy("nft", objective={"old_decay": decay, "reference_weight": 0.0})
        rollout = rolled_out(module)
        assert (module.old is None) == (decay == 0)
        count, velocity = [0], module.model.velocity

        def counted(*args, _count=count, _velocity=velocity, **kwargs) -> torch.Tensor:
            _count[0] += 1
            return _velocity(*args, **kwargs)

        module.model.velocity = counted
        found.append(gradients(module, rollout, advantages))
        forwards.append(count[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) + 1e-10)
    assert forwards == [3, 6]  # 12 pairs in micro-batches of 4


def test_the_reference_is_compared_at_the_same_states(policy) -> None:
    module = policy("nft", objective={"old_decay": 0.0, "reference_weight": 0.1})
    rollout = rolled_out(module)
    module.manual_backward = lambda loss: loss.backward()
    metrics = module.accumulate_gradients(rollout, torch.zeros(6), module.prepare(rollout, 0))
    assert float(metrics["kl"]) == pytest.approx(0.0, abs=1e-10)
    with torch.no_grad():
        module.model.transformer.proj_out.weight.mul_(1.1)
    metrics = module.accumulate_gradients(rollout, torch.zeros(6), module.prepare(rollout, 0))
    assert float(metrics["kl"]) > 1e-4
