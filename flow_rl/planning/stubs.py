"""Stands in for what a plan does not need: networks of rewards, and data files that are not there yet."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from flow_rl.models.vision_language import check_vlm_path
from flow_rl.planning.weights import build_vlm, count
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.rubrics import Rubric
from flow_rl.rewards.spec import RewardSpec
from flow_rl.rewards.vlm import VLMDtype, planned_dtype


class PlannedVLMReward(Reward):
    """Takes a `VLMReward`'s settings, checks what can be checked, and knows the size of its weights.

    Args:
        path: the export.
        dimension: which of its rubrics to judge by.
        rubric: the rubric that is expected.
        dtype: of the weights; the plan is for a GPU.
        **_others: settings that a plan does not need.
    """

    def __init__(
        self,
        path: str,
        dimension: str,
        rubric: str | None = None,
        reasoning: bool | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        max_outside: float | None = None,
        cap: bool | None = None,
        dtype: VLMDtype = "auto",
        device: str | None = None,
    ) -> None:
        check_vlm_path(path)
        expected = None if rubric is None else Rubric.load(rubric)
        self.rubric = RewardSpec.read(path).rubric(dimension, expected=expected, path=path)
        self.path = path
        self.planned_bytes = count(build_vlm(path).parameters()) * planned_dtype(dtype, on_gpu=True).itemsize

    @property
    @override
    def judges_edits(self) -> bool:
        return self.rubric.task == "edit"

    @override
    def score(self, samples: Samples) -> Tensor:
        raise AssertionError("a plan scores nothing")
