"""The reward rises along the update of every shipped config, on the shipped base, and falls where it was made to.

The reward is planted (mean brightness), so that which way is up is known without any model.
"""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from datamodules.prompts import read_prompts
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.windows import WindowSettings
from flow_rl.monitoring.update_direction import Probe, probe_update
from flow_rl.rl import objectives
from flow_rl.rl.objectives import Clipped, Objective
from flow_rl.rl.settings import RolloutSettings
from lightning_modules import GRPOPolicy
from tests.cli.real_runs import whole
from tests.planted import Brightness


def probe(rollout: RolloutSettings, objective: Objective, *, prompts: int, step_size: float) -> Probe:
    module = GRPOPolicy(
        model_path="demo/base",
        image_size=32,
        rewards={"brightness": Brightness()},
        optimizer=partial(torch.optim.SGD, lr=1.0),
        rollout=rollout,
        objective=objective,
    )
    module.configure_model()
    module.manual_backward = lambda loss: loss.backward()
    training = read_prompts("demo/prompts/train.jsonl").select(list(range(prompts)))
    held_out = read_prompts("demo/prompts/validation.jsonl")
    held_out = held_out.select(list(range(0, len(held_out), len(held_out) // 24))[:24])  # of all categories
    found = probe_update(module, training, held_out, step_size=step_size)
    assert found is not None
    return found


def settings(*names: str) -> tuple[RolloutSettings, Objective]:
    """What the teacher's config says with others stacked on top."""
    stack = [whole(f"configs/{name}.yaml")["model"]["init_args"] for name in ("demo/t2i_teacher", *names)]
    model = OmegaConf.to_container(OmegaConf.merge(*stack))
    rollout, objective = model["rollout"], model["objective"]
    kind = getattr(objectives, objective["class_path"].rpartition(".")[2])
    taken = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    rollout["guidance"] = Guidance(**rollout["guidance"])
    if "window" in rollout:
        rollout["window"] = WindowSettings(**rollout["window"])
    return RolloutSettings(**rollout), kind(
        **{name: value for name, value in objective["init_args"].items() if name in taken}
    )


STACKS = [(), *(("objective/" + kind,) for kind in ("nft", "clipped", "guarded"))]
STACKS += [
    ("objective/clipped", other)
    for other in ("sampler/cps", "sampler/dance", "window/sliding", "objective/step_weights")
]
#: the demo's, and the policy gradient with the paper's guidance; the others take minutes
QUICK = [("guidance/none",), ("objective/clipped", "guidance/rollout_only")]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(stack, marks=[] if stack in QUICK else pytest.mark.slow)
        for names in STACKS
        for stack in ((*names, "guidance/none"), (*names, "guidance/rollout_only"))
    ],
    ids=lambda names: "+".join(name.split("/")[1] for name in names) or "demo",
)
def test_reward_rises_along_the_update_of_shipped_configs(names: tuple[str, ...]) -> None:
    found = probe(*settings(*names), prompts=24, step_size=0.2)
    assert found.slope > 0
    assert found.rise > found.error


@pytest.mark.parametrize(
    ("guidance", "uphill"),
    [
        (Guidance(scale=3.5, high=0.8), False),  # on the last step alone, sigma 0.75 -> 0
        pytest.param(Guidance(scale=3.5, low=0.8), True, marks=pytest.mark.slow),  # on the first alone, sigma 1 -> 0.75
    ],
    ids=["wrong way", "guided at high noise"],
)
def test_guidance_on_a_coarse_last_step_turns_the_update_round(guidance: Guidance, uphill: bool) -> None:
    """The planted wrong way: captions pin the conditional branch, so there the guided sensitivity is below zero."""
    rollout = RolloutSettings(
        num_steps=2,
        group_size=16,
        guidance=guidance,
        transition="flow_sde",
        shared_noise=True,
        window=WindowSettings(count=1, fraction=0.5),
        batch_size=512,
        allow_coarse_guidance=True,
    )
    found = probe(rollout, Clipped(micro_batch_size=64), prompts=32, step_size=0.2)
    assert (found.slope > 0) is uphill
    assert found.not_uphill is not uphill
