"""What a GRPO run can be told. `settings_checks` has what it refuses to be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from flow.guidance import Guidance


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """Which denoising steps are stochastic and trained (policy-gradient objectives only)."""

    kind: Literal["high_noise", "low_noise", "sliding", "all"] = "high_noise"
    """high_noise: drawn anew each iteration from the first `fraction` of the steps; low_noise: from the last
    (the paper's counter-example); sliding: MixGRPO; all: every step but the last."""
    count: int = 2
    """How many steps: the size of the draw or of the sliding window."""
    fraction: float = 0.5
    """high_noise, low_noise: the share of the schedule that steps are drawn from."""
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
    transition: Literal["ode", "flow_sde", "cps", "dance"] = "ode"
    """What happens at the steps of the window; every other step is an ODE step. nft, the default objective, wants
    ode, a policy gradient one of the others."""
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
    """clipped, guarded: half-width of the trust interval of the ratio, whose logarithm is a mean over dimensions."""
    step_weights: Literal["uniform", "noise"] = "uniform"
    """clipped, guarded: noise weights each trained step's loss by the noise it adds, over the mean of the trained
    steps (TempFlow-GRPO)."""
    kl_weight: float = 0.0
    """clipped, guarded: weight of the KL divergence to the weights before training; 0 needs no reference."""
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
        ValueError: what the optimizer or the scheduler refused, or a learning rate of 0.
    """
    try:
        made = optimizer([torch.nn.Parameter(torch.zeros(1))])
        if not all(group["lr"] > 0 for group in made.param_groups):
            raise ValueError("the learning rate is 0: nothing would be learnt. Set lr above 0.")
        if lr_scheduler is not None:
            lr_scheduler(made)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer or model.lr_scheduler: {error}") from None


def check_schedule(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable, steps: int) -> None:
    """Follow the learning rate to the end of the run.

    Args:
        optimizer: as configured.
        lr_scheduler: as configured, stepped after every update.
        steps: updates of the run; -1 for no end.

    Raises:
        ValueError: a schedule that fails before the run's end, or at whose end, long before, the rate is 0.
    """
    made = optimizer([torch.nn.Parameter(torch.zeros(1))])
    schedule = lr_scheduler(made)
    made.step()  # a schedule warns if it is stepped before its optimizer
    idle = 0
    for step in range(steps):
        idle = 0 if any(group["lr"] > 0 for group in made.param_groups) else idle + 1
        try:
            schedule.step()
        except (TypeError, ValueError) as error:  # a schedule that wants a metric is no schedule of updates
            raise ValueError(
                f"model.lr_scheduler: at update {step + 1} of trainer.max_steps = {steps}: {error}"
            ) from None
    if idle > max(1, steps // 20):  # a schedule may well end at 0 with the run, or an update before
        raise ValueError(
            f"model.lr_scheduler: the learning rate is 0 in the last {idle} of trainer.max_steps = {steps} updates, "
            "which would teach nothing. Let the schedule be as long as the run."
        )


def check_positive(**values: float) -> None:
    """Refuse settings of the model, by name, that are not above 0.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"model.{name} is {value}; it must be above 0.")
