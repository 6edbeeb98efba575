"""From one rollout to micro-batch losses: the policy gradient (clipped, guarded) and NFT."""

from flow_rl.rl.objectives.base import Metrics, Objective, Pairs, Rollout, micro_batches
from flow_rl.rl.objectives.nft import NFT
from flow_rl.rl.objectives.policy_gradient import PolicyGradient

OBJECTIVES: dict[str, type[Objective]] = {"clipped": PolicyGradient, "guarded": PolicyGradient, "nft": NFT}

__all__ = ["NFT", "OBJECTIVES", "Metrics", "Objective", "Pairs", "PolicyGradient", "Rollout", "micro_batches"]
