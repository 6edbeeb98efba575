"""Windows of trained steps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from flow_rl.flow.noise import Stream, keyed_generator
from flow_rl.flow.windows import (
    WindowSettings,
    all_steps,
    draw_steps,
    high_noise_steps,
    low_noise_steps,
    sliding_window,
    steps_of_iteration,
    steps_within_reach,
    window_size,
)


def generator(step: int = 0) -> torch.Generator:
    return keyed_generator(seed=0, step=step, stream=Stream.WINDOW)


def test_all_steps_leave_out_the_last() -> None:
    assert all_steps(4) == (0, 1, 2)


def test_windows_reach_the_last_step_where_it_can_be_trained() -> None:
    assert all_steps(4, last=True) == (0, 1, 2, 3)
    assert high_noise_steps(5, 5, 1.0, generator(), last=True) == (0, 1, 2, 3, 4)
    assert low_noise_steps(10, 2, 0.2, generator(), last=True) == (8, 9)
    assert sliding_window(5, 2, 3, last=True) == (3, 4)
    for kind in ("high_noise", "low_noise", "sliding", "all"):
        window = WindowSettings(kind=kind, count=2, fraction=1.0, every=1)
        assert steps_within_reach(window, 5, last=True) == (0, 1, 2, 3, 4)
        seen = [draw_steps(window, 5, iteration=i, generator=generator(i), last=True) for i in range(40)]
        assert {step for steps in seen for step in steps} == {0, 1, 2, 3, 4}
        assert {len(steps) for steps in seen} == {window_size(window, 5, last=True)}


def test_high_noise_steps_are_a_sorted_subset_of_the_part() -> None:
    seen = Counter()
    for step in range(400):
        steps = high_noise_steps(40, 3, 0.3, generator(step))
        assert list(steps) == sorted(set(steps))
        assert len(steps) == 3
        seen.update(steps)
    # Uniform over the first 12 steps: each is expected 100 times, with a deviation of 8.7.
    assert set(seen) == set(range(12))
    assert all(60 < n < 140 for n in seen.values())


def test_high_noise_steps_depend_on_the_key_alone() -> None:
    assert high_noise_steps(40, 4, 0.5, generator(7)) == high_noise_steps(40, 4, 0.5, generator(7))


@pytest.mark.parametrize(("num_steps", "fraction", "available"), [(10, 0.3, 3), (100, 0.29, 29), (10, 1.0, 9)])
def test_part_counts_whole_steps_and_never_the_last(num_steps: int, fraction: float, available: int) -> None:
    assert high_noise_steps(num_steps, available, fraction, generator()) == tuple(range(available))
    with pytest.raises(ValueError, match=f"between 1 and {available}"):
        high_noise_steps(num_steps, available + 1, fraction, generator())


def test_low_noise_steps_come_from_the_other_end() -> None:
    drawn = [low_noise_steps(10, 2, 0.3, generator(i)) for i in range(60)]
    assert {step for steps in drawn for step in steps} == {6, 7, 8}
    assert all(first < second for first, second in drawn)


def test_window_slides_and_starts_over() -> None:
    lefts = [sliding_window(10, 4, i, stride=2, every=3)[0] for i in range(15)]
    # Positions 0, 2, 4 and, short of a whole stride, 5, where the window ends on step 8.
    assert lefts == [0, 0, 0, 2, 2, 2, 4, 4, 4, 5, 5, 5, 0, 0, 0]
    assert sliding_window(10, 4, 9, stride=2, every=3) == (5, 6, 7, 8)
    assert sliding_window(5, 4, 123) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: all_steps(1), "at least 2 steps"),
        (lambda: high_noise_steps(10, 2, 0.05, generator()), "holds none. Raise fraction"),
        (lambda: high_noise_steps(10, 0, 0.5, generator()), "between 1 and 5"),
        (lambda: high_noise_steps(10, 2, 50, generator()), r"fraction must lie in \(0, 1\], received 50"),
        (lambda: sliding_window(10, 10, 0), "between 1 and 9"),
        (lambda: sliding_window(10, 2, 0, stride=0), "stride=0"),
        (lambda: sliding_window(10, 2, -1), "iteration=-1"),
    ],
)
def test_bad_input_is_explained(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


WINDOWS = [
    WindowSettings(count=3, fraction=0.5),
    WindowSettings(kind="low_noise", count=2, fraction=0.3),
    WindowSettings(kind="sliding", count=4, every=1),
    WindowSettings(kind="all"),
]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.kind)
def test_every_draw_has_the_windows_size_and_stays_within_reach(window: WindowSettings) -> None:
    seen = set()
    for number in range(60):
        steps = draw_steps(window, 10, iteration=number, generator=generator(number))
        assert len(steps) == window_size(window, 10)
        assert list(steps) == sorted(set(steps))
        seen.update(steps)
    assert seen == set(steps_within_reach(window, 10))


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.kind)
def test_the_steps_of_an_iteration_are_the_draw_of_its_key(window: WindowSettings) -> None:
    for number in range(5):
        drawn = draw_steps(window, 10, iteration=number, generator=generator(number))
        assert steps_of_iteration(window, 10, iteration=number, seed=0) == drawn
