"""What reward fine-tuning can be told, and what it refuses to be told.

Every combination that would train silently wrong ends here, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flow_rl.models.adapters import LoraSettings
from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rewards.rubrics import Rubric


@dataclass(frozen=True, kw_only=True)
class RewardObjective:
    """What an update minimises."""

    kind: Literal["pointwise", "pairwise"] = "pointwise"
    """pointwise: cross-entropy of the answer and the squared error of the expected score; pairwise: Bradley-Terry."""
    cross_entropy: float = 1.0
    """Weight of the cross-entropy of the assistant's turn."""
    regression: float = 1.0
    """pointwise: lambda, weight of (R - y)^2."""
    direct_share: float = 0.0
    """Share of the training examples answered without reasoning: the score alone, after a given `Score: `. 0 trains
    reasoned answers only, 1 direct ones only; between, the model can do both. An example that has no reasoning is
    always answered directly, besides this share of the others."""

    def __post_init__(self) -> None:
        for name in ("cross_entropy", "regression"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.objective.{name} is {getattr(self, name)}; a weight is at least 0.")
        if self.kind == "pointwise" and self.cross_entropy == self.regression == 0:
            raise ValueError("model.objective: cross_entropy and regression are both 0, so nothing would be learnt.")
        if not 0 <= self.direct_share <= 1:
            raise ValueError(f"model.objective.direct_share is {self.direct_share}; it is a share in [0, 1].")


def check_reward_settings(
    objective: RewardObjective,
    reading: ReadingSettings,
    *,
    lora: LoraSettings | None,
    quantization: str,
    dtype: str,
) -> None:
    """Refuse what can't work together.

    Raises:
        ValueError: with what was received, why it is refused and what to change.
    """
    if quantization == "nf4" and lora is None:
        raise ValueError(
            "model.quantization is 'nf4', but 4-bit weights can't be trained: set model.lora as well (QLoRA), or "
            "quantization to 'none'."
        )
    if dtype == "bfloat16" and lora is None:
        raise ValueError(
            "model.dtype is 'bfloat16' with all weights trained: small updates would be rounded away. Keep float32 and "
            "set trainer.precision to 'bf16-mixed', or set model.lora."
        )
    if reading.reasoning and objective.direct_share == 1:
        raise ValueError(
            "model.reading.reasoning is true, but with model.objective.direct_share 1 no reasoning is ever trained: "
            "set reasoning to false, or direct_share below 1."
        )
    if not reading.reasoning and objective.direct_share == 0:
        raise ValueError(
            "model.reading.reasoning is false, but with model.objective.direct_share 0 no answer without reasoning is "
            "ever trained: set direct_share above 0, or reasoning to true."
        )


def check_reward_data(data: Any, objective: RewardObjective, rubrics: Mapping[str, Rubric]) -> None:
    """Refuse data that the objective or the rubrics can't be trained on.

    Args:
        data: an `AnnotationDataModule` or a `PreferenceDataModule`; anything else is not looked at.
        objective: of the run.
        rubrics: by dimension.

    Raises:
        ValueError: with what to change.
    """
    dimensions = getattr(data, "dimensions", None)
    if dimensions is None:
        return
    unknown = [d for d in dimensions if d not in rubrics]
    if unknown:
        raise ValueError(
            f"The data judge {', '.join(unknown)}, for which model.rubrics has no entry (it has {', '.join(rubrics)}). "
            "Add the rubric, or leave the dimension out with data.dimensions."
        )
    pairs = hasattr(data, "source")
    if pairs != (objective.kind == "pairwise"):
        wanted = "PreferenceDataModule" if objective.kind == "pairwise" else "AnnotationDataModule"
        raise ValueError(
            f"model.objective.kind is '{objective.kind}', but the data are a {type(data).__name__}: use a {wanted}."
        )
    if objective.direct_share < 1 and not data.any_reasoning:
        raise ValueError(
            "No training example has a reasoning, but model.objective.direct_share below 1 trains reasoned answers: "
            "set direct_share to 1 and model.reading.reasoning to false, or add annotations with a reasoning."
        )
    if objective.direct_share == 0 and not data.has_reasoning:
        raise ValueError(
            "Some training examples have no reasoning and can only be trained as direct answers, but "
            "model.objective.direct_share is 0, which trains reasoned answers only: set it above 0, or add the "
            "reasonings."
        )
    known = [p.chosen for p in data.source.pairs] if pairs else []
    for annotation in (*known, *data.train, *data.validation, *data.test):
        if rubrics[annotation.dimension].task == "edit" and annotation.source is None:
            raise ValueError(
                f"The rubric '{annotation.dimension}' judges edits, but the annotation with id {annotation.id!r} has "
                "no 'source'."
            )
