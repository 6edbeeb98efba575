"""The stochastic, trained steps of one iteration."""

from __future__ import annotations

from flow.noise import Stream, keyed_generator
from flow.windows import all_steps, high_noise_steps, sliding_window
from lightning_modules.settings import ObjectiveSettings, RolloutSettings, WindowSettings


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
    return high_noise_steps(num_steps, window.count, window.fraction, generator=generator)


def check_window(rollout: RolloutSettings, objective: ObjectiveSettings) -> None:
    """Draw a window once, so that one that does not fit is refused before a model loads.

    Raises:
        ValueError: a window that does not fit the schedule, where the objective uses one.
    """
    if objective.kind == "nft":
        return
    try:
        steps_of_iteration(rollout.window, rollout.num_steps, iteration=0, seed=0)
    except ValueError as error:
        raise ValueError(f"model.rollout.window: {error}") from None
