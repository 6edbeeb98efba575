"""What a GRPO run can be told. `settings_checks` has what it refuses to be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flow_rl.flow.guidance import Guidance
from flow_rl.flow.windows import WindowSettings


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
