"""What a GRPO run refuses to be told: every combination that would train silently wrong, before a model is loaded.

The question behind each check: what does the worst plausible misconfiguration do? docs/settings_refused.md lists the
answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from flow_rl.flow.windows import WindowSettings, steps_within_reach
from flow_rl.messages import warn_on_first_rank
from flow_rl.models.adapters import LoraSettings
from flow_rl.rl.settings import ObjectiveSettings, RolloutSettings

#: a last step from above this level down to 0 is coarse: there strong guidance can turn a policy gradient round
COARSE_SIGMA = 0.15
#: log-ratios are means over dimensions: a ratio that several updates move further than this is out of control
WIDEST_CLIP = 0.05


def check_settings(
    rollout: RolloutSettings,
    objective: ObjectiveSettings,
    sigmas: Sequence[float],
    lora: LoraSettings | None = None,
) -> None:
    """Refuse what would train silently wrong.

    Args:
        rollout: of the run.
        objective: of the run.
        sigmas: the schedule, T + 1 noise levels from 1 down to 0.
        lora: the adapter, if one is trained.

    Raises:
        ValueError: with what was received, why it is refused and what to change.
    """
    _check_numbers(rollout, objective)
    _check_guidance(rollout, sigmas)
    if lora is not None and lora.dropout > 0:
        raise ValueError(
            f"model.lora.dropout is {lora.dropout}: rollout and update would see other networks, so the ratio would "
            "not start at 1 and a resumed run would not repeat. Set model.lora.dropout to 0."
        )
    if objective.kind == "nft":
        _check_nft(rollout, objective, sigmas)
    else:
        _check_transition(rollout, objective, sigmas)
        _check_policy_gradient(rollout, objective)
        _check_credit(rollout, sigmas)


def _check_numbers(rollout: RolloutSettings, objective: ObjectiveSettings) -> None:
    if 1 <= rollout.batch_size < rollout.group_size:
        raise ValueError(
            f"model.rollout.batch_size is {rollout.batch_size}, but a group of {rollout.group_size} images is made "
            f"at a time: it would bound nothing. Set it to {rollout.group_size} or more, or model.rollout.group_size "
            "lower."
        )
    at_least = {
        "model.rollout.num_steps": (rollout.num_steps, 2),
        "model.rollout.group_size": (rollout.group_size, 2),
        "model.rollout.batch_size": (rollout.batch_size, 1),
        "model.objective.updates": (objective.updates, 1),
        "model.objective.micro_batch_size": (objective.micro_batch_size, 1),
        "model.objective.nft_steps": (objective.nft_steps, 1),
        "model.objective.max_skipped": (objective.max_skipped, 1),
        # Below 0 they would reward distance, or carry the old policy away from the new one.
        "model.objective.kl_weight": (objective.kl_weight, 0),
        "model.objective.nft_reference_weight": (objective.nft_reference_weight, 0),
        "model.objective.old_decay_growth": (objective.old_decay_growth, 0),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            reason = " A group of one has no baseline." if name.endswith("group_size") else ""
            raise ValueError(f"{name} is {value}; it must be at least {least}.{reason}")
    for name, value in {
        "clip_range": objective.clip_range,
        "advantage_clip": objective.advantage_clip,
        "std_floor": objective.std_floor,
        "nft_beta": objective.nft_beta,
    }.items():
        if not value > 0:
            raise ValueError(f"model.objective.{name} is {value}; it must be positive.")


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
            f"({_levels(sigmas)}): no image would be guided. Widen the interval, or set cfg to 'none' with scale 1."
        )


def _check_nft(rollout: RolloutSettings, objective: ObjectiveSettings, sigmas: Sequence[float]) -> None:
    if rollout.transition != "ode":
        raise ValueError(
            f"The nft objective trains on ODE rollouts, but model.rollout.transition is '{rollout.transition}'. "
            "Set it to 'ode'."
        )
    if rollout.window != WindowSettings():
        warn_on_first_rank(
            "model.rollout.window has no effect under nft, which has no stochastic steps. The noise levels that it "
            "trains are between model.objective.nft_sigma_low and nft_sigma_high."
        )
    if rollout.shared_noise:
        raise ValueError(
            "model.rollout.shared_noise with ODE rollouts makes all images of a group identical: every advantage "
            "would be 0. Set shared_noise to false."
        )
    if rollout.cfg == "both":
        raise ValueError("model.rollout.cfg 'both' has no meaning for nft, which never guides its objective.")
    if objective.kl_weight > 0:
        raise ValueError(
            f"model.objective.kl_weight is {objective.kl_weight}, but nft has no transition whose KL it could weigh: "
            "it would be ignored. Set kl_weight to 0 and nft_reference_weight instead."
        )
    if objective.step_weights != "uniform":
        raise ValueError(
            f"model.objective.step_weights is '{objective.step_weights}', but nft has no stochastic steps to weigh: it "
            "would be ignored. Set step_weights to 'uniform', and choose levels with nft_sigma_low and nft_sigma_high."
        )
    low, high = objective.nft_sigma_low, objective.nft_sigma_high
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"model.objective.nft_sigma_low {low} and nft_sigma_high {high} must satisfy 0 <= low < high <= 1."
        )
    if not any(low <= float(sigma) <= high for sigma in sigmas[:-1]):
        raise ValueError(
            f"model.objective.nft_sigma_low {low} to nft_sigma_high {high} holds no noise level at which the rollout "
            f"asks the model ({_levels(sigmas)}): what is trained would never shape an image. Widen the range."
        )
    if not 0 <= objective.old_decay < 1:
        raise ValueError(f"model.objective.old_decay is {objective.old_decay}; it must lie in [0, 1).")
    if objective.old_decay > 0 and objective.old_decay_growth == 0:
        raise ValueError(
            f"model.objective.old_decay is {objective.old_decay}, but with old_decay_growth 0 it is never reached: the "
            "old policy would follow at once. Set old_decay to 0 to mean that, or a growth above 0."
        )


def _check_transition(rollout: RolloutSettings, objective: ObjectiveSettings, sigmas: Sequence[float]) -> None:
    """The stochastic steps: that there are some, and that they are steps of a sampler still."""
    if rollout.transition == "ode" or rollout.noise_level <= 0:
        raise ValueError(
            f"The {objective.kind} objective needs stochastic steps, but model.rollout.transition is "
            f"'{rollout.transition}' with noise_level {rollout.noise_level}: an ODE step has no log-probability. "
            "Choose flow_sde, cps or dance with noise_level above 0, or model.objective.kind nft."
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


def _check_policy_gradient(rollout: RolloutSettings, objective: ObjectiveSettings) -> None:
    if objective.kind == "guarded" and rollout.transition == "cps":
        raise ValueError(
            "The guarded objective centres the log-ratio of a Gaussian density, which cps does not give (its published "
            "log-probability drops 1 / (2 std^2)). Set model.rollout.transition to 'flow_sde' or 'dance', or "
            "model.objective.kind to 'clipped'."
        )
    if objective.step_weights == "noise":
        if rollout.transition == "cps":
            raise ValueError(
                "model.objective.step_weights 'noise' undoes the 1 / std of a Gaussian log-density. That of cps has "
                "none: the noisiest steps would count twice over. Set step_weights to 'uniform', or the transition to "
                "'flow_sde'."
            )
        if rollout.window.kind != "all" and rollout.window.count == 1:
            raise ValueError(
                "model.objective.step_weights 'noise' compares the trained steps of an iteration; of one step alone it "
                "is always 1. Set model.rollout.window.count above 1, or step_weights to 'uniform'."
            )
    if objective.clip_range >= 1 or (objective.updates > 1 and objective.clip_range > WIDEST_CLIP):
        raise ValueError(
            f"model.objective.clip_range is {objective.clip_range}: the log-ratio is a mean over dimensions, so a "
            "ratio that far from 1 means the run is lost, and nothing would be clipped before. Published: 1e-4, 1e-5 "
            "for windows of one or two steps, 2e-6 for guarded."
        )


def _check_credit(rollout: RolloutSettings, sigmas: Sequence[float]) -> None:
    last = float(sigmas[-2])
    if rollout.guidance.active(last) and last > COARSE_SIGMA and not rollout.allow_coarse_guidance:
        raise ValueError(
            f"Guidance {rollout.guidance.scale} acts on the last step, which is coarse (sigma {last:.2f} -> 0): "
            "there a policy gradient's credit can point the wrong way. Limit it to high noise "
            "(model.rollout.guidance.low 0.6), use more steps, use model.objective.kind nft, or accept it with "
            "model.rollout.allow_coarse_guidance true."
        )


def _levels(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{float(sigma):.2f}" for sigma in sigmas[:-1])
