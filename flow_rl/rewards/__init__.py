"""Scorers behind one interface: everything the trainer knows of a reward is `Reward.score`.

Those that need heavy libraries are imported from their own modules: `flow_rl.rewards.vlm.VLMReward`,
`flow_rl.rewards.remote.RemoteReward`, `flow_rl.rewards.openai.OpenAIReward`, `flow_rl.rewards.face.FaceIdentityReward`
and `flow_rl.rewards.ocr.OCRReward`.
"""

from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.composite import CompositeReward, Part
from flow_rl.rewards.faults import FaultPolicy, GuardedReward, RewardFailure

__all__ = ["CompositeReward", "FaultPolicy", "GuardedReward", "Part", "Reward", "RewardFailure", "Samples"]
