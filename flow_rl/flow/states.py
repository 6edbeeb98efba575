"""Which states of a rollout a distillation step looks at, and what each counts.

Shapes: N states of one trajectory, those whose velocity is evaluated, at noise levels sigma_0 = 1 > ... > sigma_{N-1}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flow_rl.flow.transitions import transition


def choose_states(
    sigmas: Tensor, count: int | None = None, *, bias: float = 0.0, generator: torch.Generator | None = None
) -> tuple[int, ...]:
    """Draw K of the N states without replacement, each draw with probability proportional to `sigma ** bias`.

    No importance weights undo the bias: it is a choice of where to look. DanceOPD (worldbench/DanceOPD) reports
    that one low-noise state can beat all of them.

    Args:
        sigmas: the schedule, descending to 0, shape (N + 1,).
        count: K, from 1 to N; None takes all N, in which case nothing is drawn.
        bias: 0 is uniform, above 0 favours high noise, below 0 low noise.
        generator: of the draw.

    Returns:
        K indices into the N states, ascending.

    Raises:
        ValueError: for a K outside 1..N.
    """
    levels = sigmas[:-1].double()
    if count is None:
        return tuple(range(len(levels)))
    if not 1 <= count <= len(levels):
        raise ValueError(f"count is {count}; a trajectory of {len(levels)} steps has 1 to {len(levels)} states.")
    if count == len(levels):
        return tuple(range(count))
    drawn = torch.multinomial(levels**bias, count, replacement=False, generator=generator)
    return tuple(sorted(drawn.tolist()))


def kl_weights(sigmas: Tensor, *, kind: str, noise_level: float) -> Tensor:
    """What a squared velocity error counts in the KL divergence of the stochastic step at each state.

    The mean of a transition is affine in the velocity, `mean = a x + c v`, and its std does not depend on v, so
    two velocities at one state give `KL = c^2 / (2 std^2) ||dv||^2`. This is `c^2 / (2 std^2)`.

    Args:
        sigmas: the schedule, descending to 0, shape (N + 1,).
        kind: a stochastic transition whose last step has noise: `flow_sde` or `dance`.
        noise_level: of the transition, above 0.

    Returns:
        float32 on the CPU, shape (N,).

    Raises:
        ValueError: for a transition that is deterministic somewhere: its KL would be infinite.
    """
    sigmas = sigmas.cpu().float()
    unit = torch.ones(len(sigmas) - 1, 1)
    step = transition(
        kind, torch.zeros_like(unit), unit, sigmas[:-1], sigmas[1:], noise_level=noise_level, sigma_cap=float(sigmas[1])
    )
    std = step.std.expand_as(unit)
    if not bool((std > 0).all()):
        raise ValueError(
            f"kind '{kind}' at noise level {noise_level} has a step without noise, where the KL divergence of two "
            "velocities is infinite. Use flow_sde or dance with a noise level above 0."
        )
    return (step.mean.square() / (2 * std.square()))[:, 0]
