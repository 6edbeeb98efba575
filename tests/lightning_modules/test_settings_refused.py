"""What would train silently wrong is refused at start-up, with the reason; what is sound is not.

Every row of docs/settings_refused.md has one here.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, PolynomialLR, ReduceLROnPlateau, StepLR

from flow_rl.flow.guidance import Guidance
from flow_rl.flow.windows import WindowSettings
from flow_rl.models.adapters import LoraSettings
from flow_rl.rl.objectives import NFT, Clipped, Objective
from flow_rl.rl.settings import AdvantageSettings, RolloutSettings
from flow_rl.rl.settings_checks import check_settings
from lightning_modules.base import check_optimizer, check_schedule
from tests.expectations import does_not_raise
from tests.toy_policy import OBJECTIVES

#: ten steps with a shift of 3: the last goes from 0.25 down to 0
SIGMAS = [3 * t / (1 + 2 * t) for t in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)]
#: sixteen steps without a shift: the last goes from 0.06 down to 0
FINE = [1 - i / 16 for i in range(17)]
PG = {"num_steps": 10, "transition": "flow_sde", "guidance": Guidance(scale=2.5, low=0.6)}
ODE = {"num_steps": 10, "transition": "ode", "guidance": Guidance(scale=2.5)}
UNGUIDED = {"guidance": Guidance(scale=1.0), "cfg": "none"}


def made(kind: str, **settings: object) -> Objective:
    return OBJECTIVES[kind](**settings)


def window(**settings: object) -> dict:
    return {"window": WindowSettings(**settings)}


REFUSED = [
    # ------------------------------------------------ sizes and signs
    (ODE | {"group_size": 1}, {"kind": "nft"}, "no baseline"),
    (ODE | {"num_steps": 1}, {"kind": "nft"}, "num_steps is 1"),
    (ODE, {"kind": "nft", "updates": 0}, "updates is 0"),
    (PG, {"kind": "clipped", "clip_range": 0.0}, "must be above 0"),
    (PG, {"kind": "clipped", "kl_weight": -0.01}, "kl_weight is -0.01"),
    (ODE, {"kind": "nft", "reference_weight": -1.0}, "reference_weight is -1"),
    (ODE, {"kind": "nft", "old_decay_growth": -0.1}, "old_decay_growth is -0.1"),
    # ------------------------------------------------ guidance
    (ODE | {"cfg": "none"}, {"kind": "nft"}, "would be ignored"),
    (ODE | {"guidance": Guidance(scale=1.0)}, {"kind": "nft"}, "no guidance"),
    (ODE | {"guidance": Guidance(scale=0.5)}, {"kind": "nft"}, "leads away from the prompt"),
    (ODE | {"guidance": Guidance(scale=2.5, high=0.2)}, {"kind": "nft"}, "no image would be guided"),
    (ODE | {"cfg": "both"}, {"kind": "nft"}, "no meaning for NFT"),
    (PG | {"guidance": Guidance(scale=2.5)}, {"kind": "guarded"}, "wrong way"),
    # ------------------------------------------------ nft
    (ODE | {"shared_noise": True}, {"kind": "nft"}, "identical"),
    (ODE | {"transition": "flow_sde"}, {"kind": "nft"}, "ODE rollouts"),
    (ODE | window(count=6), {"kind": "nft"}, "Cannot draw 6 steps"),
    (ODE | window(kind="sliding", count=11), {"kind": "nft"}, "does not fit"),
    (ODE, {"kind": "nft", "old_decay": 1.0}, r"\[0, 1\)"),
    (ODE, {"kind": "nft", "old_decay": 0.5, "old_decay_growth": 0.0}, "never reached"),
    (ODE | {"batch_size": 4, "group_size": 8}, {"kind": "nft"}, "a group of 8 images is made at a time"),
    # ------------------------------------------------ stochastic steps
    (PG | {"transition": "ode"}, {"kind": "clipped"}, "no log-probability"),
    (PG | {"noise_level": 0.0}, {"kind": "clipped"}, "needs stochastic steps"),
    (PG | {"transition": "cps", "noise_level": 1.2}, {"kind": "clipped"}, r"lies in \(0, 1\]"),
    (PG | {"transition": "cps"} | window(kind="all"), {"kind": "clipped"}, "shrinks"),
    (PG | {"transition": "cps"} | window(kind="sliding", count=9), {"kind": "clipped"}, "shrinks"),
    (PG | {"noise_level": 3.0}, {"kind": "clipped"}, "turn the latents' sign"),
    (PG | {"transition": "dance", "noise_level": 9.0}, {"kind": "clipped"}, "turn the latents' sign"),
    (PG | window(count=6), {"kind": "clipped"}, "Cannot draw 6 steps"),
    (PG | window(kind="sliding", count=10), {"kind": "clipped"}, "does not fit"),
    (PG | window(kind="low_noise", count=2, fraction=0.05), {"kind": "clipped"}, "holds none"),
    # ------------------------------------------------ policy gradients
    (PG | {"transition": "cps"}, {"kind": "guarded"}, "Gaussian density"),
    (PG | {"transition": "cps"}, {"kind": "clipped", "step_weights": "noise"}, "count twice over"),
    (PG | window(count=1), {"kind": "clipped", "step_weights": "noise"}, "of one step alone"),
    (PG, {"kind": "clipped", "clip_range": 1.0}, "mean over dimensions"),
    (PG, {"kind": "clipped", "clip_range": 0.2, "updates": 2}, "mean over dimensions"),
]


@pytest.mark.parametrize(("rollout", "objective", "message"), REFUSED)
def test_what_would_train_silently_wrong_is_refused(rollout: dict, objective: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(RolloutSettings(**rollout), made(**objective), SIGMAS)


@pytest.mark.parametrize(
    ("rollout", "objective"),
    [
        (ODE, {"kind": "nft"}),
        (ODE | UNGUIDED, {"kind": "nft", "old_decay": 0.0}),
        (ODE | window(kind="all"), {"kind": "nft"}),
        (PG, {"kind": "clipped", "updates": 4, "kl_weight": 0.04, "step_weights": "noise"}),
        (PG, {"kind": "guarded", "clip_range": 2e-6, "step_weights": "noise"}),
        (PG | {"cfg": "both"}, {"kind": "clipped"}),
        (PG | {"transition": "dance", "noise_level": 0.3} | window(kind="all"), {"kind": "guarded"}),
        (PG | {"transition": "cps"} | window(kind="sliding", count=3), {"kind": "clipped"}),
        (PG | window(kind="low_noise", count=3, fraction=0.3), {"kind": "clipped"}),
        (PG | {"guidance": Guidance(scale=2.5), "allow_coarse_guidance": True}, {"kind": "clipped"}),
    ],
)
def test_sound_settings_and_the_explicit_risk_pass(rollout: dict, objective: dict) -> None:
    with does_not_raise(ValueError):
        check_settings(RolloutSettings(**rollout), made(**objective), SIGMAS)


def test_a_floor_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.advantages\.std_floor is 0\.0; it must be above 0"):
        check_settings(RolloutSettings(**ODE), NFT(), SIGMAS, advantages=AdvantageSettings(std_floor=0.0))


def test_guidance_on_a_fine_last_step_passes() -> None:
    guided = RolloutSettings(num_steps=16, transition="flow_sde", guidance=Guidance(scale=2.5))
    with does_not_raise(ValueError):
        check_settings(guided, Clipped(), FINE)


def test_an_adapter_with_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.dropout is 0\.1"):
        check_settings(RolloutSettings(**ODE), NFT(), SIGMAS, LoraSettings(rank=2, alpha=4, dropout=0.1))


def test_a_learning_rate_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="learning rate is 0"):
        check_optimizer(partial(torch.optim.AdamW, lr=0.0))


SCHEDULES = {
    "decays with the run": (partial(PolynomialLR, total_iters=100), None),
    "keeps a rate": (partial(StepLR, step_size=10), None),
    "has decayed long before": (partial(PolynomialLR, total_iters=50), r"0 in the last 50 of trainer\.max_steps = 100"),
    "wants a metric": (ReduceLROnPlateau, r"at update 1 of .* 'metrics'"),
    "ends before": (partial(OneCycleLR, max_lr=1e-3, total_steps=50), r"at update 51 of trainer\.max_steps = 100"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_followed_to_the_end_of_the_run(name: str) -> None:
    schedule, message = SCHEDULES[name]
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_schedule(partial(torch.optim.AdamW, lr=1e-3), schedule, 100)


def test_a_run_without_a_last_step_takes_any_schedule() -> None:
    with does_not_raise(ValueError):
        check_schedule(partial(torch.optim.AdamW, lr=1e-3), partial(PolynomialLR, total_iters=5), -1)


def test_the_policy_checks_before_a_model_loads(policy, monkeypatch) -> None:
    monkeypatch.setattr("lightning_modules.grpo_policy.load_image_model", lambda *_a, **_k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="no log-probability"):
        policy("clipped", rollout={"transition": "ode"})
    with pytest.raises(ValueError, match="dropout"):
        policy("nft", lora=LoraSettings(rank=2, alpha=4, dropout=0.1))


def test_every_refusal_is_in_the_docs() -> None:
    """By the setting that its message names first."""
    text = (Path(__file__).parents[2] / "docs" / "settings_refused.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(?:rollout\.|objective\.)?([a-z_.]+)", text))
    for rollout, objective, _ in REFUSED:
        with pytest.raises(ValueError) as error:
            check_settings(RolloutSettings(**rollout), made(**objective), SIGMAS)
        named = re.search(r"model\.(?:rollout|objective|advantages)\.([a-z_.]+)", str(error.value))
        name = named[1].rstrip(".") if named else "transition"
        assert name in documented, f"{name}: {error.value}"
