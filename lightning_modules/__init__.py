"""One LightningModule a training stage."""

from lightning_modules.distillation_student import DistillationStudent
from lightning_modules.flow_pretrain import FlowPretrain
from lightning_modules.grpo_policy import GRPOPolicy
from lightning_modules.reward_finetune import RewardFinetune

__all__ = ["DistillationStudent", "FlowPretrain", "GRPOPolicy", "RewardFinetune"]
