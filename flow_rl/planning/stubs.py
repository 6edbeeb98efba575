"""Stands in for what a plan does not need: the networks of rewards."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from flow_rl.planning.weights import build_vlm, count
from flow_rl.rewards import Samples
from flow_rl.rewards.vlm import VLMReward, planned_dtype


class PlannedVLMReward(VLMReward):
    """A `VLMReward` that checks its settings and knows the size of its weights, but loads none.

    Attributes:
        planned_bytes: of the weights on a GPU.
    """

    @override
    def load(self) -> None:
        weights = count(build_vlm(self.path).parameters())
        self.planned_bytes = weights * planned_dtype(self.dtype, on_gpu=True).itemsize

    @override
    def score(self, samples: Samples) -> Tensor:
        raise AssertionError("a plan scores nothing")
