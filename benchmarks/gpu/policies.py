"""GRPO policies of the real dimensions, and what the doctor plans for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.random_model import RandomQwenImage21, Scale, random_model, scale_of
from benchmarks.gpu.rewards import PixelReward
from flow_rl.batches import PromptData
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.windows import WindowSettings
from flow_rl.models.adapters import LoraSettings
from flow_rl.planning.plan import Plan, make_plan
from flow_rl.planning.setup import Setup
from flow_rl.planning.weights import Components, build
from flow_rl.rl.objectives import NFT, Clipped, Guarded, Objective
from flow_rl.rl.settings import RolloutSettings
from lightning_modules import GRPOPolicy

#: objectives by the names that the cases give them
OBJECTIVES: dict[str, type[Objective]] = {"clipped": Clipped, "guarded": Guarded, "nft": NFT}
#: Flow-GRPO's adapter, and that of the published Qwen-Image runs
LORA = LoraSettings(rank=32, alpha=64)
LORA_64 = LoraSettings(rank=64, alpha=128)


def policy(
    scale: Scale,
    *,
    kind: str = "clipped",
    steps: int | None = None,
    size: int | None = None,
    guidance: float = 4.0,
    lora: LoraSettings | None = LORA,
    micro_batch: int = 4,
    checkpointing: bool = False,
) -> GRPOPolicy:
    """One prompt x `scale.samples` images, two trained steps, frozen weights in bfloat16."""
    return GRPOPolicy(
        model_path=scale.card,
        image_size=size or scale.size,
        rewards={"pixels": PixelReward()},
        optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
        rollout=RolloutSettings(
            num_steps=steps or scale.steps,
            group_size=scale.samples,
            guidance=Guidance(scale=guidance),
            cfg="none" if guidance == 1 else "rollout_only",
            batch_size=scale.samples,
            allow_coarse_guidance=True,
            transition="ode" if kind == "nft" else "flow_sde",
            window=WindowSettings(count=2, fraction=0.75),
        ),
        objective=OBJECTIVES[kind](micro_batch_size=micro_batch),
        lora=lora,
        frozen_dtype="bfloat16" if scale.dtype == torch.bfloat16 else "float32",
        gradient_checkpointing=checkpointing,
    )


@contextmanager
def random_weights(bench: Bench, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, a policy that loads its model gets random weights on the device instead."""

    def load(path: str, *, image_size: tuple[int, int], **_: Any) -> RandomQwenImage21:
        return random_model(bench.device, scale_of(bench), dtype=dtype, size=image_size[0])

    with patch("lightning_modules.grpo_policy.load_image_model", load):
        yield


@dataclass(frozen=True, kw_only=True)
class _One:
    prompts_per_step: int = 1
    eval_batch_size: int = 1
    image_size: int | None = None


class OnePrompt(PromptData):
    """Data of one prompt an iteration.

    Args:
        task: of the prompt.
    """

    def __init__(self, task: str) -> None:
        self.task = task

    def by_task(self) -> dict[str, _One]:
        return {self.task: _One()}


def planned(bench: Bench, module: GRPOPolicy, *, edit: bool = False) -> Plan:
    """The doctor's plan of a policy on one device, one prompt an iteration."""
    scale = scale_of(bench)
    ours = module.lora
    parts: Components = bench.keep(f"parts {ours}", lambda: build(scale.card, ours))
    setup = Setup(model=module, data=OnePrompt("edit" if edit else "t2i"), trainer={"devices": 1})
    plan = make_plan(setup, parts)
    assert plan is not None, "a GRPO policy has a plan"
    return plan


def planned_weights_gb(plan: Plan, *names: str) -> float:
    """GB of these items of a plan that are always there.

    Raises:
        KeyError: the plan has no such item.
    """
    always = {item.name: item.size for item in plan.memory.always}
    return sum(always[name] for name in names) / 1e9


def planned_moment_gb(plan: Plan, *moments: str, weights: Sequence[str] = ("transformer", "VAE")) -> float:
    """GB at the fullest of these moments of a plan, with the weights that a measurement holds.

    The latents of an iteration are left out: a single evaluation or update does not keep them.

    Raises:
        KeyError: the plan has no such moment or weights.
    """
    found = {moment.name: moment for moment in plan.memory.moments}
    sizes = [sum(item.size for item in found[name].items if item.name != "latents kept") for name in moments]
    return planned_weights_gb(plan, *weights) + max(sizes) / 1e9


def planned_peak_gb(plan: Plan) -> float:
    """GB at the plan's fullest moment, less the text encoder, which is left out here."""
    moments = [moment.size for moment in plan.memory.moments if moment.name != "encode prompts"]
    always = sum(item.size for item in plan.memory.always if item.name != "text encoder")
    return (always + max(moments)) / 1e9
