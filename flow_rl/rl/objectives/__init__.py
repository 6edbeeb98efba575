"""From one rollout to micro-batch losses. Every objective is a plug-in: see `Objective`."""

from flow_rl.rl.objectives.base import Metrics, Objective, Pairs, Rollout, micro_batches
from flow_rl.rl.objectives.nft import NFT
from flow_rl.rl.objectives.policy_gradient import Clipped, Guarded, PolicyGradient

__all__ = [
    "NFT",
    "Clipped",
    "Guarded",
    "Metrics",
    "Objective",
    "Pairs",
    "PolicyGradient",
    "Rollout",
    "micro_batches",
]
