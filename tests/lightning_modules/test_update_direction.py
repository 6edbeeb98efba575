"""The reward rises along the update for every shipped objective, on the shipped base.

The reward is planted (mean brightness), so that which way is up is known without any model.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from planted import Brightness

from datamodules.prompts import read_prompts
from flow.guidance import Guidance
from lightning_modules import GRPOPolicy
from lightning_modules.probe import Probe, probe_update
from lightning_modules.settings import ObjectiveSettings, RolloutSettings, WindowSettings


def probe(kind: str) -> Probe:
    module = GRPOPolicy(
        model_path="demo/base",
        image_size=32,
        rewards={"brightness": Brightness()},
        optimizer=partial(torch.optim.SGD, lr=1.0),
        rollout=RolloutSettings(
            num_steps=8,
            group_size=8,
            guidance=Guidance(scale=2.5, low=0.6),
            transition="ode" if kind == "nft" else "flow_sde",
            shared_noise=kind != "nft",
            window=WindowSettings(count=2, fraction=0.5),
        ),
        objective=ObjectiveSettings(kind=kind, micro_batch_size=64, nft_sigma_low=0.3, advantage_clip=2.0),
    )
    module.configure_model()
    module.manual_backward = lambda loss: loss.backward()
    training = read_prompts("demo/prompts/train.jsonl").select(list(range(8)))
    held_out = read_prompts("demo/prompts/validation.jsonl").select(list(range(10)))
    return probe_update(module, training, held_out, step_size=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nft", "clipped", "guarded"])
def test_reward_rises_along_the_update(kind: str) -> None:
    """At the guidance of the shipped configs: scale 2.5 above sigma 0.6."""
    assert probe(kind).rise > 0.01
