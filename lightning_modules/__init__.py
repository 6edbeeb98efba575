"""One LightningModule a training stage, imported when it is asked for: each has libraries of its own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.distillation_student import DistillationStudent
    from lightning_modules.flow_pretrain import FlowPretrain
    from lightning_modules.grpo_policy import GRPOPolicy
    from lightning_modules.reward_finetune import RewardFinetune

__all__ = ["DistillationStudent", "FlowPretrain", "GRPOPolicy", "RewardFinetune"]
_PLACES = {
    "DistillationStudent": "distillation_student",
    "FlowPretrain": "flow_pretrain",
    "GRPOPolicy": "grpo_policy",
    "RewardFinetune": "reward_finetune",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lightning_modules' has no attribute '{name}'")
    return getattr(import_module(f"lightning_modules.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
