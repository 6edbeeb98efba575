"""One LightningModule a training stage, imported when it is asked for: each has libraries of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flow_rl.lazy_names import on_demand

if TYPE_CHECKING:
    from lightning_modules.distillation_student import DistillationStudent
    from lightning_modules.flow_pretrain import FlowPretrain
    from lightning_modules.grpo_policy import GRPOPolicy
    from lightning_modules.reward_finetune import RewardFinetune

__all__ = ["DistillationStudent", "FlowPretrain", "GRPOPolicy", "RewardFinetune"]
__getattr__, __dir__ = on_demand(
    __name__,
    {
        "DistillationStudent": "distillation_student",
        "FlowPretrain": "flow_pretrain",
        "GRPOPolicy": "grpo_policy",
        "RewardFinetune": "reward_finetune",
    },
)
