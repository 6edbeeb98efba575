"""A small policy with a planted reward."""

from __future__ import annotations

from functools import partial

import torch
from lightning import Callback
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.rollout import Trajectory
from flow_rl.flow.windows import WindowSettings
from flow_rl.rl.iteration import Iteration
from flow_rl.rl.objectives import NFT, Clipped, Guarded, Objective, Rollout
from flow_rl.rl.settings import RolloutSettings
from lightning_modules import GRPOPolicy
from tests.planted import Brightness

#: the objectives by the names that tests give them
OBJECTIVES: dict[str, type[Objective]] = {"clipped": Clipped, "guarded": Guarded, "nft": NFT}


class LastIteration(Callback):
    """Keeps what the last training step returned."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.iteration: Iteration = outputs["iteration"]


def toy_rollout(prompts: Prompts, group_size: int, images: Tensor | None = None) -> Rollout:
    """A rollout that was never denoised, for what looks at prompts and images alone."""
    count = len(prompts) * group_size
    nothing = torch.zeros(count, 1, 1)
    return Rollout(
        settings=RolloutSettings(group_size=group_size),
        prompts=prompts,
        images=torch.zeros(count, 3, 1, 1) if images is None else images,
        trajectory=Trajectory(latents=nothing, steps=(), states=nothing[None], next_states=nothing[None]),
        sigmas=torch.zeros(0),
        conditioning=None,
        unconditional=None,
        members=tuple(range(group_size)) * len(prompts),
        iteration=0,
        seed=0,
    )


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
        "objective": OBJECTIVES[kind](**({"micro_batch_size": 4} | (objective or {}))),
    } | changes
    return GRPOPolicy(**arguments)
