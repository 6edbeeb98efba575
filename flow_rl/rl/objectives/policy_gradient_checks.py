"""What a policy gradient refuses of its rollout: steps that cannot be trained, or whose credit would be wrong."""

from __future__ import annotations

from collections.abc import Sequence

from flow_rl.flow.windows import steps_within_reach
from flow_rl.rl.objectives.base import SETTINGS
from flow_rl.rl.settings import RolloutSettings

#: a last step from above this level down to 0 is coarse: there strong guidance can turn a policy gradient round
COARSE_SIGMA = 0.15
#: log-ratios are means over dimensions: a ratio that several updates move further than this is out of control
WIDEST_CLIP = 0.05


def check_transition(rollout: RolloutSettings, sigmas: Sequence[float], *, objective: str) -> None:
    """Refuse a rollout without stochastic steps, or with steps that no sampler would take.

    Args:
        rollout: of the run.
        sigmas: the schedule, T + 1 noise levels from 1 down to 0.
        objective: its name, for the message.

    Raises:
        ValueError: with what was received, why it is refused and what to change.
    """
    if rollout.transition == "ode" or rollout.noise_level <= 0:
        raise ValueError(
            f"The {objective} objective needs stochastic steps, but model.rollout.transition is "
            f"'{rollout.transition}' with noise_level {rollout.noise_level}: an ODE step has no log-probability. "
            "Choose flow_sde, cps or dance with noise_level above 0, or set model.objective to "
            "flow_rl.rl.objectives.NFT."
        )
    reach = steps_within_reach(rollout.window, rollout.num_steps)
    if rollout.transition == "cps":
        if rollout.noise_level > 1:
            raise ValueError(
                f"model.rollout.noise_level is {rollout.noise_level}; for cps it lies in (0, 1], a share of the noise."
            )
        if rollout.window.kind == "all" or rollout.window.count >= rollout.num_steps - 1:
            raise ValueError(
                "cps on all steps shrinks the spread of the images (0.39 for 0.50 on a known Gaussian). "
                "Set model.rollout.window.kind to 'high_noise' or 'sliding' with few steps, or the transition to "
                "'flow_sde'."
            )
        return
    for step in reach:
        sigma, variance = float(sigmas[step]), _variance(rollout, sigmas, step)
        if variance > 2 * sigma:
            raise ValueError(
                f"model.rollout.noise_level {rollout.noise_level} is more than step {step} of {rollout.num_steps} can "
                f"hold (sigma {sigma:.2f} -> {float(sigmas[step + 1]):.2f}): its mean would turn the latents' sign. "
                "Lower noise_level (published: 0.7 for flow_sde, 0.3 for dance), or raise num_steps."
            )


def _variance(rollout: RolloutSettings, sigmas: Sequence[float], step: int) -> float:
    """std^2 of a flow_sde or dance step; both put `1 - std^2 / (2 sigma)` before x in their mean."""
    sigma, sigma_next = float(sigmas[step]), float(sigmas[step + 1])
    rate = rollout.noise_level**2
    if rollout.transition == "flow_sde":
        rate *= sigma / (1 - (float(sigmas[1]) if sigma == 1 else sigma))
    return rate * (sigma - sigma_next)


def check_step_weights(rollout: RolloutSettings, step_weights: str) -> None:
    """Refuse step weights that would not weigh.

    Raises:
        ValueError: with what was received, why it is refused and what to change.
    """
    if step_weights != "noise":
        return
    if rollout.transition == "cps":
        raise ValueError(
            f"{SETTINGS}.step_weights 'noise' undoes the 1 / std of a Gaussian log-density. That of cps has none: the "
            "noisiest steps would count twice over. Set step_weights to 'uniform', or the transition to 'flow_sde'."
        )
    if rollout.window.kind != "all" and rollout.window.count == 1:
        raise ValueError(
            f"{SETTINGS}.step_weights 'noise' compares the trained steps of an iteration; of one step alone it is "
            "always 1. Set model.rollout.window.count above 1, or step_weights to 'uniform'."
        )


def check_clip_range(clip_range: float, updates: int) -> None:
    """Refuse a trust interval so wide that nothing would ever be clipped.

    Raises:
        ValueError: with what was received, why it is refused and what to change.
    """
    if clip_range >= 1 or (updates > 1 and clip_range > WIDEST_CLIP):
        raise ValueError(
            f"{SETTINGS}.clip_range is {clip_range}: the log-ratio is a mean over dimensions, so a ratio that far from "
            "1 means the run is lost, and nothing would be clipped before. Published: 1e-4, 1e-5 for windows of one or "
            "two steps, 2e-6 for Guarded."
        )


def check_credit(rollout: RolloutSettings, sigmas: Sequence[float]) -> None:
    """Refuse guidance on a coarse last step.

    Raises:
        ValueError: with what was received, why it is refused and what to change.
    """
    last = float(sigmas[-2])
    if rollout.guidance.active(last) and last > COARSE_SIGMA and not rollout.allow_coarse_guidance:
        raise ValueError(
            f"Guidance {rollout.guidance.scale} acts on the last step, which is coarse (sigma {last:.2f} -> 0): "
            "there a policy gradient's credit can point the wrong way. Limit it to high noise "
            "(model.rollout.guidance.low 0.6), use more steps, set model.objective to flow_rl.rl.objectives.NFT, or "
            "accept it with model.rollout.allow_coarse_guidance true."
        )
