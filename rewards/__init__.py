"""Scorers behind one interface: everything the trainer knows of a reward is `Reward.score`.

Those that need heavy libraries are imported from their own modules: `rewards.vlm.VLMReward`,
`rewards.remote.RemoteReward`, `rewards.openai.OpenAIReward`, `rewards.face.FaceIdentityReward` and
`rewards.ocr.OCRReward`.
"""

from rewards.base import Reward, Samples
from rewards.composite import CompositeReward, Part
from rewards.faults import FaultPolicy, GuardedReward, RewardFailure

__all__ = ["CompositeReward", "FaultPolicy", "GuardedReward", "Part", "Reward", "RewardFailure", "Samples"]
