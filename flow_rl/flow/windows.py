"""Which denoising steps are trained.

Shapes: T denoising steps, 0 (pure noise) to T - 1.

A policy gradient's rollout is stochastic at the steps of the window. The window is drawn once an iteration and shared
by all members of a group: a draw for each sample would add its own spread to the rewards that are compared. NFT trains
at the noise levels of these steps. Its rollout does not depend on them, so each sample has a draw of its own.

A policy gradient's window never holds the last step. It ends at sigma = 0: CPS has no randomness left there, and
Flow-SDE and DanceGRPO would leave their fresh noise in the finished image. NFT adds no noise, so its windows may reach
the last step (`last`): with few steps, a good part of the image is decided there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flow_rl.flow.noise import Stream, keyed_generator


def all_steps(num_steps: int, *, last: bool = False) -> tuple[int, ...]:
    """Every step that can be trained: 0 to T - 2, or to T - 1.

    Args:
        num_steps: T, from 2 up.
        last: the last step can be trained as well.

    Raises:
        ValueError: for fewer than 2 steps, as the last cannot be trained.
    """
    _check_num_steps(num_steps)
    return tuple(range(_trainable(num_steps, last)))


def high_noise_steps(
    num_steps: int, count: int, fraction: float, generator: torch.Generator, *, last: bool = False
) -> tuple[int, ...]:
    """Draw steps from the high-noise part of the schedule, without replacement.

    Args:
        num_steps: T.
        count: how many to draw.
        fraction: the part of the schedule, from its start, to draw from, in (0, 1].
        generator: a CPU generator, such as `noise.keyed_generator(seed, step, Stream.WINDOW)`: one made from
            the iteration's key draws the same window on every rank.
        last: the last step can be trained as well.

    Returns:
        `count` steps, ascending.

    Raises:
        ValueError: where the part has fewer than `count` steps.
    """
    part = _steps_in_part(num_steps, count, fraction, last)
    return tuple(sorted(torch.randperm(part, generator=generator)[:count].tolist()))


def low_noise_steps(
    num_steps: int, count: int, fraction: float, generator: torch.Generator, *, last: bool = False
) -> tuple[int, ...]:
    """Draw steps from the low-noise part of the schedule, without replacement: the paper's counter-example.

    Args:
        num_steps: T.
        count: how many to draw.
        fraction: the part of the schedule to draw from, in (0, 1], counted back from the last step that can be
            trained.
        generator: see `high_noise_steps`.
        last: see `high_noise_steps`.

    Returns:
        `count` steps, ascending.

    Raises:
        ValueError: where the part has fewer than `count` steps.
    """
    part = _steps_in_part(num_steps, count, fraction, last)
    first = _trainable(num_steps, last) - part
    return tuple(sorted((first + torch.randperm(part, generator=generator)[:count]).tolist()))


def sliding_window(
    num_steps: int, size: int, iteration: int, *, stride: int = 1, every: int = 1, last: bool = False
) -> tuple[int, ...]:
    """Consecutive steps that move from high noise to low as training goes on, then start over (MixGRPO).

    Args:
        num_steps: T.
        size: steps in the window.
        iteration: training iteration, from 0.
        stride: how many steps the window moves at a time.
        every: for how many iterations it stays.
        last: the last step can be trained as well.

    Returns:
        `size` steps, ascending. The window's last position touches the last step that can be trained, also
        where the stride does not divide the way there.

    Raises:
        ValueError: for a window larger than what can be trained, or numbers below their least.
    """
    trainable = _trainable(num_steps, last)
    if not 1 <= size <= trainable:
        raise ValueError(
            f"A window of {size} does not fit the {trainable} steps that can be trained{_never(last)}. Set size "
            f"between 1 and {trainable}, or raise num_steps."
        )
    if stride < 1 or every < 1 or iteration < 0:
        raise ValueError(
            "stride and every must be from 1 up and iteration from 0 up; received "
            f"stride={stride}, every={every}, iteration={iteration}."
        )
    furthest = trainable - size
    positions = math.ceil(furthest / stride) + 1
    left = min(iteration // every % positions * stride, furthest)
    return tuple(range(left, left + size))


def _steps_in_part(num_steps: int, count: int, fraction: float, last: bool) -> int:
    """How many steps that can be trained lie in a part of the schedule, at least `count`."""
    trainable = _trainable(num_steps, last)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], received {fraction}.")
    # 0.3 * 10 is a hair above 3, and 0.29 * 100 a hair below 29: count whole steps regardless.
    available = min(math.floor(fraction * num_steps + 1e-9), trainable)
    if not available:
        raise ValueError(f"A part of {fraction:g} of {num_steps} steps holds none. Raise fraction or num_steps.")
    if not 1 <= count <= available:
        raise ValueError(
            f"Cannot draw {count} steps from a part of {fraction:g} of {num_steps}: {available} can be trained"
            f"{_never(last)}. Set count between 1 and {available}, or raise fraction or num_steps."
        )
    return available


def _trainable(num_steps: int, last: bool) -> int:
    """How many steps of T can be trained, the first ones."""
    _check_num_steps(num_steps)
    return num_steps if last else num_steps - 1


def _never(last: bool) -> str:
    return "" if last else " (never the last)"


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 2:
        raise ValueError(
            f"Training needs a rollout of at least 2 steps, as the last one cannot be trained; received {num_steps}."
        )


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """Which denoising steps are trained: drawn once an iteration for a policy gradient, for each sample under NFT."""

    kind: Literal["high_noise", "low_noise", "sliding", "all"] = "high_noise"
    """high_noise: drawn from the first `fraction` of the steps; low_noise: from the last (the paper's counter-example);
    sliding: MixGRPO; all: every step, but for a policy gradient the last."""
    count: int = 2
    """How many steps: the size of the draw or of the sliding window. `all` ignores it."""
    fraction: float = 0.5
    """high_noise, low_noise: the share of the schedule that steps are drawn from."""
    every: int = 25
    """sliding: iterations before the window moves on by one step."""


_DRAWN = {"high_noise": high_noise_steps, "low_noise": low_noise_steps}


def draw_steps(
    window: WindowSettings, num_steps: int, *, iteration: int, generator: torch.Generator, last: bool = False
) -> tuple[int, ...]:
    """Steps by the window's rule, ascending.

    Args:
        window: the rule.
        num_steps: T.
        iteration: training iteration, from 0; a sliding window depends on it.
        generator: a CPU generator; `high_noise` and `low_noise` depend on it.
        last: the last step can be trained as well.

    Returns:
        `window_size(window, num_steps, last=last)` steps.

    Raises:
        ValueError: a window that does not fit the schedule.
    """
    if window.kind == "all":
        return all_steps(num_steps, last=last)
    if window.kind == "sliding":
        return sliding_window(num_steps, window.count, iteration, every=window.every, last=last)
    return _DRAWN[window.kind](num_steps, window.count, window.fraction, generator=generator, last=last)


def window_size(window: WindowSettings, num_steps: int, *, last: bool = False) -> int:
    """How many steps a draw of the window has, the same number in every iteration."""
    return len(all_steps(num_steps, last=last)) if window.kind == "all" else window.count


def steps_of_iteration(window: WindowSettings, num_steps: int, *, iteration: int, seed: int) -> tuple[int, ...]:
    """Draw an iteration's steps, the same for every group and rank: a function of (seed, iteration) alone.

    Raises:
        ValueError: a window that does not fit the schedule.
    """
    generator = keyed_generator(seed=seed, step=iteration, sample_id=0, member=0, stream=Stream.WINDOW)
    return draw_steps(window, num_steps, iteration=iteration, generator=generator)


def steps_within_reach(window: WindowSettings, num_steps: int, *, last: bool = False) -> tuple[int, ...]:
    """Every step that some iteration may train, ascending.

    Raises:
        ValueError: a window that does not fit the schedule, by the name of its setting.
    """
    try:
        draw_steps(window, num_steps, iteration=0, generator=torch.Generator(), last=last)
    except ValueError as error:
        raise ValueError(f"model.rollout.window: {error}") from None
    trainable = all_steps(num_steps, last=last)
    if window.kind not in _DRAWN:
        return trainable
    part = min(int(window.fraction * num_steps + 1e-9), len(trainable))
    return trainable[:part] if window.kind == "high_noise" else trainable[-part:]
