"""How a GRPO run rolls out and turns scores into advantages. `settings_checks` has what it refuses.

The settings of an objective are its own: see `flow_rl.rl.objectives`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """What happens at the steps of the window; every other step is an ODE step. The NFT objective needs ode, a policy
    gradient one of the others."""
    noise_level: float = 0.7
    """Amount of noise of a stochastic step; eta for dance."""
    window: WindowSettings = field(default_factory=WindowSettings)
    """The trained steps. A policy gradient's rollout is stochastic there; NFT trains at their noise levels."""
    shared_noise: bool = False
    """Members of a group start from the same noise: the steps before the first stochastic one are computed once."""
    batch_size: int = 128
    """Images denoised at a time; bounds memory, changes nothing else."""
    allow_coarse_guidance: bool = False
    """Let a policy gradient run with guidance on a coarse last step, where its credit can point the wrong way."""


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How several rewards become one advantage."""

    mode: Literal["per_reward", "sum"] = "per_reward"
    """per_reward: each reward is normalised in its group, then they are summed (the paper's Eq. 13); sum: the weighted
    sum is normalised, the baseline of the comparison."""
    std_floor: float = 0.1
    """Smallest in-group standard deviation of a reward, in points of the 1..5 scale."""
    batch_normalise: bool = False
    """Standardise the advantages once more over the whole iteration, as GDPO's code does. No gradient is computed then
    before every score of the iteration is there."""


def named_levels(sigmas: Sequence[float]) -> str:
    """The noise levels at which a rollout asks the model, for a message."""
    return ", ".join(f"{float(sigma):.2f}" for sigma in sigmas[:-1])
