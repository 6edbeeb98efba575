"""One LightningModule a training stage."""

from lightning_modules.flow_pretrain import FlowPretrain
from lightning_modules.grpo_policy import GRPOPolicy

__all__ = ["FlowPretrain", "GRPOPolicy"]
