"""From noise to latents: ODE steps, stochastic ones where asked for, and the record that training needs.

Shapes: N samples, ... the latent dimensions, T denoising steps, S recorded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flow_rl.flow.transitions import check_kind, transition

Velocity = Callable[[Tensor, int, float], Tensor]
"""`velocity(x, i, sigma) -> v`: latents (N, ...) at step i of noise level sigma to velocities (N, ...)."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a rollout leaves behind.

    Attributes:
        latents: x after the last step taken, float32, shape (N, ...).
        steps: the recorded steps, ascending, S of them.
        states: x before each recorded step, float32 or `store_dtype`, shape (S, N, ...).
        next_states: x after each recorded step, same dtype and shape.
    """

    latents: Tensor
    steps: tuple[int, ...]
    states: Tensor
    next_states: Tensor


def rollout(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    kind: str = "ode",
    noise_level: float = 0.0,
    stochastic_steps: Collection[int] = (),
    step_noise: Callable[[int], Tensor] | None = None,
    start: int = 0,
    stop: int | None = None,
    store_dtype: torch.dtype | None = None,
    record_all: bool = False,
    enable_grad: bool = False,
) -> Trajectory:
    """Denoise x along the schedule: the ODE everywhere but at the stochastic steps, which are recorded.

    The recorded steps can be replayed exactly: with `store_dtype`, x is rounded to it before a recorded
    step's velocity is evaluated, and x_next before it is carried on, so what is stored is what was used.

    Args:
        velocity: the (guided) velocity, called once a step.
        x: latents at `sigmas[start]`, shape (N, ...).
        sigmas: the schedule, descending, shape (T + 1,), as `schedule.sigma_schedule` makes it.
        kind: the transition at the stochastic steps; see `transitions.KINDS`.
        noise_level: its noise level.
        stochastic_steps: which steps, each in [0, T), the same for all rows. Those outside [start, stop)
            do not run, so a rollout in two parts takes the same list twice.
        step_noise: `step_noise(i)` is the standard normal noise of step i, shape (N, ...); needed where there
            are stochastic steps.
        start: first step to take. Members of a group that share their first noise share every step before
            the first stochastic one: run that part at one row a prompt, repeat the rows, go on from there.
        stop: step to stop before; None is T.
        store_dtype: dtype in which recorded states are kept; None keeps float32.
        record_all: record every step taken, as distillation needs it.
        enable_grad: let gradients flow through the rollout; off, no graph is built.

    Returns:
        The final latents and the recorded steps.

    Raises:
        ValueError: for a bad schedule, steps out of range, or stochastic steps without noise or kind.
    """
    num_steps = len(sigmas) - 1
    stop = num_steps if stop is None else stop
    chosen = frozenset(int(i) for i in stochastic_steps)
    levels = _checked_levels(sigmas)
    _check_steps(kind, chosen, step_noise, start, stop, num_steps)
    steps: list[int] = []
    states: list[Tensor] = []
    next_states: list[Tensor] = []
    with torch.set_grad_enabled(enable_grad):
        x = x.float()
        for i in range(start, stop):
            # `_check_steps` has refused stochastic steps without noise.
            noise = step_noise if i in chosen else None
            recorded = noise is not None or record_all
            x = _rounded(x, store_dtype if recorded else None)
            step = transition(
                "ode" if noise is None else kind,
                x,
                velocity(x, i, levels[i]),
                levels[i],
                levels[i + 1],
                noise_level=noise_level,
                sigma_cap=levels[1],
            )
            x_next = step.mean if noise is None else step.sample(noise(i).to(x.device))
            if recorded:
                x_next = _rounded(x_next, store_dtype)
                steps.append(i)
                states.append(x.to(store_dtype or torch.float32))
                next_states.append(x_next.to(store_dtype or torch.float32))
            x = x_next
        empty = x.new_empty((0, *x.shape), dtype=store_dtype or torch.float32)
        return Trajectory(
            latents=x,
            steps=tuple(steps),
            states=torch.stack(states) if states else empty,
            next_states=torch.stack(next_states) if next_states else empty,
        )


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """X as it will read once it was stored in dtype; float32."""
    return x if dtype is None else x.to(dtype).float()


def _checked_levels(sigmas: Tensor) -> list[float]:
    """The schedule as numbers: one wait for the device here instead of one a step."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas must be a schedule of T + 1 noise levels, T >= 1; received shape {tuple(sigmas.shape)}."
        )
    levels = sigmas.tolist()
    if any(not after < now for now, after in pairwise(levels)):
        raise ValueError(f"sigmas must descend from noise to data; received {levels}.")
    return levels


def _check_steps(
    kind: str,
    chosen: frozenset[int],
    step_noise: Callable[[int], Tensor] | None,
    start: int,
    stop: int,
    num_steps: int,
) -> None:
    check_kind(kind)
    if not 0 <= start <= stop <= num_steps:
        raise ValueError(
            f"Expected 0 <= start <= stop <= {num_steps} (the schedule's steps); received start={start}, stop={stop}."
        )
    outside = sorted(i for i in chosen if not 0 <= i < num_steps)
    if outside:
        raise ValueError(f"stochastic_steps {outside} lie outside the schedule, whose steps are 0 to {num_steps - 1}.")
    if chosen and kind == "ode":
        raise ValueError(
            f"stochastic_steps {sorted(chosen)} need a stochastic kind (flow_sde, cps or dance); received kind 'ode'."
        )
    if chosen and step_noise is None:
        raise ValueError(f"stochastic_steps {sorted(chosen)} need step_noise, a function of the step.")
