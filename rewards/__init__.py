"""Scorers behind one interface: everything the trainer knows of a reward is `Reward.score`."""

from rewards.base import Reward, Samples

__all__ = ["Reward", "Samples"]
