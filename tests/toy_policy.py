"""A small policy with a planted reward."""

from __future__ import annotations

from functools import partial

import torch

from flow_rl.flow.guidance import Guidance
from flow_rl.flow.windows import WindowSettings
from flow_rl.rl.settings import ObjectiveSettings, RolloutSettings
from lightning_modules import GRPOPolicy
from tests.planted import Brightness


def toy_policy(
    path: str, kind: str = "nft", rollout: dict | None = None, objective: dict | None = None, **changes: object
) -> GRPOPolicy:
    """A policy on the tiny model in `path`, with changes to its settings by argument of `GRPOPolicy`."""
    settings = {
        "num_steps": 4,
        "group_size": 3,
        "guidance": Guidance(scale=2.5, low=0.6),
        "transition": "ode" if kind == "nft" else "flow_sde",
        "window": WindowSettings(count=2, fraction=0.75),
    } | (rollout or {})
    arguments = {
        "model_path": path,
        "image_size": 32,
        "rewards": {"brightness": Brightness()},
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "rollout": RolloutSettings(**settings),
        "objective": ObjectiveSettings(**({"kind": kind, "micro_batch_size": 4} | (objective or {}))),
    } | changes
    return GRPOPolicy(**arguments)
