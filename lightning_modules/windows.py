"""The stochastic, trained steps of one iteration."""

from __future__ import annotations

from flow.noise import Stream, keyed_generator
from flow.windows import all_steps, high_noise_steps, low_noise_steps, sliding_window
from lightning_modules.settings import WindowSettings

_DRAWN = {"high_noise": high_noise_steps, "low_noise": low_noise_steps}


def steps_of_iteration(window: WindowSettings, num_steps: int, *, iteration: int, seed: int) -> tuple[int, ...]:
    """Steps by the window's rule, the same for every group and rank: a function of (seed, iteration) alone.

    Raises:
        ValueError: a window that does not fit the schedule.
    """
    if window.kind == "all":
        return all_steps(num_steps)
    if window.kind == "sliding":
        return sliding_window(num_steps, window.count, iteration, every=window.every)
    generator = keyed_generator(seed=seed, step=iteration, sample_id=0, member=0, stream=Stream.WINDOW)
    return _DRAWN[window.kind](num_steps, window.count, window.fraction, generator=generator)


def steps_within_reach(window: WindowSettings, num_steps: int) -> tuple[int, ...]:
    """Every step that some iteration may train, ascending.

    Raises:
        ValueError: a window that does not fit the schedule, by the name of its setting.
    """
    try:
        steps_of_iteration(window, num_steps, iteration=0, seed=0)
    except ValueError as error:
        raise ValueError(f"model.rollout.window: {error}") from None
    trainable = all_steps(num_steps)
    if window.kind not in _DRAWN:
        return trainable
    part = min(int(window.fraction * num_steps + 1e-9), len(trainable))
    return trainable[:part] if window.kind == "high_noise" else trainable[-part:]
