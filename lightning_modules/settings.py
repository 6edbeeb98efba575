"""What a GRPO run can be told, and what it refuses to be told.

Every combination that would train silently wrong ends here, before a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from flow.guidance import Guidance


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """Which denoising steps are stochastic and trained (policy-gradient objectives only)."""

    kind: Literal["high_noise", "sliding", "all"] = "high_noise"
    """high_noise: drawn anew each iteration from the first `fraction` of the steps; sliding: MixGRPO; all: every
    step but the last."""
    count: int = 2
    """How many steps: the size of the draw or of the sliding window."""
    fraction: float = 0.5
    """high_noise: the share of the schedule, from the noisy end, that steps are drawn from."""
    every: int = 25
    """sliding: iterations before the window moves on by one step."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How the images of a group are made."""

    num_steps: int = 40
    """T, denoising steps of a rollout."""
    group_size: int = 16
    """G, images a prompt."""
    guidance: Guidance = field(default_factory=lambda: Guidance(scale=4.0))
    """Classifier-free guidance of the rollout: scale, and the interval of sigma where it acts."""
    cfg: Literal["rollout_only", "both", "none"] = "rollout_only"
    """Where guidance acts. rollout_only: the paper's hybrid, the objective sees the conditional branch alone; both:
    also in the objective; none: nowhere (needs guidance.scale 1)."""
    transition: Literal["ode", "flow_sde", "cps", "dance"] = "flow_sde"
    """What happens at the steps of the window; every other step is an ODE step. NFT wants ode."""
    noise_level: float = 0.7
    """Amount of noise of a stochastic step; eta for dance."""
    window: WindowSettings = field(default_factory=WindowSettings)
    """The stochastic, trained steps."""
    shared_noise: bool = False
    """Members of a group start from the same noise: the steps before the first stochastic one are computed once."""
    batch_size: int = 128
    """Images denoised at a time; bounds memory, changes nothing else."""
    allow_coarse_guidance: bool = False
    """Let a policy gradient run with guidance on a coarse last step, where its credit can point the wrong way."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What the update minimises."""

    kind: Literal["clipped", "guarded", "nft"] = "nft"
    """clipped: Flow-GRPO's policy gradient; guarded: GRPO-Guard; nft: DiffusionNFT."""
    updates: int = 1
    """Optimizer steps a rollout."""
    micro_batch_size: int = 32
    """(sample, step) pairs a backward; bounds memory, changes nothing else."""
    clip_range: float = 1e-4
    """clipped, guarded: half-width of the trust interval of the ratio."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""
    std_floor: float = 0.1
    """Smallest in-group standard deviation of a reward, in points of the 1..5 scale."""
    nft_beta: float = 1.0
    """nft: how far the implicit policies lie from the old one."""
    nft_steps: int = 1
    """nft: noise levels drawn a sample and update."""
    nft_sigma_low: float = 0.0
    """nft: the lowest noise level trained."""
    nft_sigma_high: float = 1.0
    """nft: the highest noise level trained."""
    nft_common_noise: bool = True
    """nft: members of a group are noised alike, which cancels most of the gradient's noise and leaves its mean."""
    nft_reference_weight: float = 1e-4
    """nft: weight of the squared distance to the velocity at the start of training."""
    old_decay: float = 0.5
    """nft: the old policy follows as old <- decay old + (1 - decay) new after each rollout's updates; it starts
    at 0 and grows by `old_decay_growth` an iteration up to this."""
    old_decay_growth: float = 0.01
    """nft: see old_decay."""
    max_skipped: int = 5
    """Stop the run after so many updates in a row with a non-finite loss or gradient."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Train a low-rank adapter (peft) in place of the full weights."""

    rank: int = 32
    """Rank of the update of each layer."""
    alpha: int = 64
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"model.lora.rank is {self.rank}; it must be at least 1, or set model.lora to null.")
        if self.alpha < 1:
            raise ValueError(f"model.lora.alpha is {self.alpha}; it must be at least 1 (0 would learn nothing).")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout is {self.dropout}; it must lie in [0, 1).")


def check_optimizer(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None) -> None:
    """Try the optimizer on one number: a bad learning rate must not wait for the model to load.

    Raises:
        ValueError: what the optimizer or the scheduler refused.
    """
    try:
        made = optimizer([torch.nn.Parameter(torch.zeros(1))])
        if lr_scheduler is not None:
            lr_scheduler(made)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer or model.lr_scheduler: {error}") from None


def check_positive(**values: float) -> None:
    """Refuse settings of the model, by name, that are not above 0.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"model.{name} is {value}; it must be above 0.")


def check_settings(rollout: RolloutSettings, objective: ObjectiveSettings, last_sigma: float) -> None:
    """Refuse what would train silently wrong.

    Args:
        rollout: of the run.
        objective: of the run.
        last_sigma: the schedule's last noise level above 0, a measure of how coarse the last step is.

    Raises:
        ValueError: with what was received, why it is refused and what to change.
    """
    _check_sizes(rollout, objective)
    _check_guidance(rollout)
    if objective.kind == "nft":
        _check_nft(rollout, objective)
    else:
        _check_policy_gradient(rollout, objective, last_sigma)


def _check_sizes(rollout: RolloutSettings, objective: ObjectiveSettings) -> None:
    at_least = {
        "model.rollout.num_steps": (rollout.num_steps, 2),
        "model.rollout.group_size": (rollout.group_size, 2),
        "model.rollout.batch_size": (rollout.batch_size, 1),
        "model.objective.updates": (objective.updates, 1),
        "model.objective.micro_batch_size": (objective.micro_batch_size, 1),
        "model.objective.nft_steps": (objective.nft_steps, 1),
        "model.objective.max_skipped": (objective.max_skipped, 1),
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


def _check_guidance(rollout: RolloutSettings) -> None:
    scale = rollout.guidance.scale
    if rollout.cfg == "none" and scale != 1:
        raise ValueError(
            f"model.rollout.cfg is 'none' but guidance.scale is {scale}: the scale would be ignored. "
            "Set guidance.scale to 1, or cfg to 'rollout_only'."
        )
    if rollout.cfg != "none" and scale == 1:
        raise ValueError(
            f"model.rollout.cfg is '{rollout.cfg}' but guidance.scale is 1, which is no guidance. "
            "Set cfg to 'none', or a scale above 1."
        )


def _check_nft(rollout: RolloutSettings, objective: ObjectiveSettings) -> None:
    if rollout.transition != "ode":
        raise ValueError(
            f"The nft objective trains on ODE rollouts, but model.rollout.transition is '{rollout.transition}'. "
            "Set it to 'ode'."
        )
    if rollout.shared_noise:
        raise ValueError(
            "model.rollout.shared_noise with ODE rollouts makes all images of a group identical: every advantage "
            "would be 0. Set shared_noise to false."
        )
    if rollout.cfg == "both":
        raise ValueError("model.rollout.cfg 'both' has no meaning for nft, which never guides its objective.")
    if not 0 <= objective.nft_sigma_low < objective.nft_sigma_high <= 1:
        raise ValueError(
            f"model.objective.nft_sigma_low {objective.nft_sigma_low} and nft_sigma_high {objective.nft_sigma_high} "
            "must satisfy 0 <= low < high <= 1."
        )
    if not 0 <= objective.old_decay < 1:
        raise ValueError(f"model.objective.old_decay is {objective.old_decay}; it must lie in [0, 1).")


def _check_policy_gradient(rollout: RolloutSettings, objective: ObjectiveSettings, last_sigma: float) -> None:
    if rollout.transition == "ode" or rollout.noise_level <= 0:
        raise ValueError(
            f"The {objective.kind} objective needs stochastic steps, but model.rollout.transition is "
            f"'{rollout.transition}' with noise_level {rollout.noise_level}: an ODE step has no log-probability. "
            "Choose flow_sde, cps or dance with noise_level above 0, or model.objective.kind nft."
        )
    if rollout.transition == "cps" and rollout.window.kind == "all":
        raise ValueError(
            "cps on all steps shrinks the spread of the images (0.39 for 0.50 on a known Gaussian). "
            "Set model.rollout.window.kind to 'high_noise' or 'sliding', or the transition to 'flow_sde'."
        )
    if rollout.guidance.active(last_sigma) and last_sigma > 0.15 and not rollout.allow_coarse_guidance:
        raise ValueError(
            f"Guidance {rollout.guidance.scale} acts on the last step, which is coarse (sigma {last_sigma:.2f} -> 0): "
            "there a policy gradient's credit can point the wrong way. Limit it to high noise "
            "(model.rollout.guidance.low 0.6), use more steps, use model.objective.kind nft, or accept it with "
            "model.rollout.allow_coarse_guidance true."
        )
