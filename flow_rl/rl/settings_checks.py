"""What a GRPO run refuses to be told: every combination that would train silently wrong, before a model is loaded.

The question behind each check: what does the worst plausible misconfiguration do? docs/settings_refused.md lists the
answers. What concerns one objective is checked by that objective.
"""

from __future__ import annotations

from collections.abc import Sequence

from flow_rl.models.adapters import LoraSettings
from flow_rl.rl.objectives import Objective
from flow_rl.rl.settings import AdvantageSettings, RolloutSettings, named_levels


def check_settings(
    rollout: RolloutSettings,
    objective: Objective,
    sigmas: Sequence[float],
    lora: LoraSettings | None = None,
    advantages: AdvantageSettings = AdvantageSettings(),  # noqa: B008  (frozen)
) -> None:
    """Refuse what would train silently wrong.

    Args:
        rollout: of the run.
        objective: of the run.
        sigmas: the schedule, T + 1 noise levels from 1 down to 0.
        lora: the adapter, if one is trained.
        advantages: of the run.

    Raises:
        ValueError: with what was received, why it is refused and what to change.
    """
    _check_numbers(rollout)
    if not advantages.std_floor > 0:
        raise ValueError(f"model.advantages.std_floor is {advantages.std_floor}; it must be above 0.")
    _check_guidance(rollout, sigmas)
    if lora is not None and lora.dropout > 0:
        raise ValueError(
            f"model.lora.dropout is {lora.dropout}: rollout and update would see other networks, so the ratio would "
            "not start at 1 and a resumed run would not repeat. Set model.lora.dropout to 0."
        )
    objective.check(rollout, sigmas)


def _check_numbers(rollout: RolloutSettings) -> None:
    if 1 <= rollout.batch_size < rollout.group_size:
        raise ValueError(
            f"model.rollout.batch_size is {rollout.batch_size}, but a group of {rollout.group_size} images is made "
            f"at a time: it would bound nothing. Set it to {rollout.group_size} or more, or model.rollout.group_size "
            "lower."
        )
    for name, least in {"num_steps": 2, "group_size": 2, "batch_size": 1}.items():
        value = getattr(rollout, name)
        if value < least:
            reason = " A group of one has no baseline." if name == "group_size" else ""
            raise ValueError(f"model.rollout.{name} is {value}; it must be at least {least}.{reason}")


def _check_guidance(rollout: RolloutSettings, sigmas: Sequence[float]) -> None:
    guidance = rollout.guidance
    if rollout.cfg == "none" and guidance.scale != 1:
        raise ValueError(
            f"model.rollout.cfg is 'none' but guidance.scale is {guidance.scale}: the scale would be ignored. "
            "Set guidance.scale to 1, or cfg to 'rollout_only'."
        )
    if rollout.cfg == "none":
        return
    if guidance.scale == 1:
        raise ValueError(
            f"model.rollout.cfg is '{rollout.cfg}' but guidance.scale is 1, which is no guidance. "
            "Set cfg to 'none', or a scale above 1."
        )
    if guidance.scale < 1:
        raise ValueError(
            f"model.rollout.guidance.scale is {guidance.scale}: below 1 it leads away from the prompt, and the images "
            "that are rewarded would not be the prompt's. Set a scale above 1, or cfg to 'none' with scale 1."
        )
    if not any(guidance.active(float(sigma)) for sigma in sigmas[:-1]):
        raise ValueError(
            f"model.rollout.guidance acts at {guidance.low} < sigma <= {guidance.high}, where the schedule has no step "
            f"({named_levels(sigmas)}): no image would be guided. Widen the interval, or set cfg to 'none' with "
            "scale 1."
        )
