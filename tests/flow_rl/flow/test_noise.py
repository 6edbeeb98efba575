"""Keyed noise: a function of its key and nothing else, and normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flow_rl.flow.noise import Stream, _mix, batch_noise, keyed_generator, keyed_noise

KEY = {"seed": 7, "step": 3, "sample_id": 11, "member": 2, "stream": Stream.STEP, "index": 5}


def draw(ids: list[int], members: list[int]) -> Tensor:
    return batch_noise((16, 48), seed=7, step=3, ids=ids, members=members, stream=Stream.INITIAL)


def test_row_does_not_depend_on_its_batch() -> None:
    ids, members = [5, 5, 9, 1_000_000_007], [0, 1, 0, 3]
    whole = draw(ids, members)
    for n in range(4):
        assert torch.equal(draw([ids[n]], [members[n]])[0], whole[n])
    order = [2, 0, 3, 1]
    assert torch.equal(draw([ids[n] for n in order], [members[n] for n in order]), whole[order])
    alone = keyed_noise((16, 48), seed=7, step=3, sample_id=9, member=0, stream=Stream.INITIAL)
    assert torch.equal(alone, whole[2])


def test_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    first = keyed_noise((8,), **KEY)
    state = torch.get_rng_state()
    assert torch.equal(first, keyed_noise((8,), **KEY))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"step": 4},
        {"sample_id": 12},
        {"member": -1},
        {"stream": Stream.INITIAL},
        {"index": 6},
        {"seed": 7 + 2**32},
        {"seed": 3, "step": 7},
    ],
    ids=str,
)
def test_any_part_of_the_key_changes_the_noise(change: dict) -> None:
    one, other = keyed_noise((4096,), **KEY), keyed_noise((4096,), **(KEY | change))
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / math.sqrt(4096)


def test_streams_are_distinct() -> None:
    rows = torch.stack([keyed_noise((2048,), **(KEY | {"stream": stream})) for stream in Stream])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(correlation.abs().max()) < 5 / math.sqrt(2048)


def test_moments_and_distribution_are_normal() -> None:
    z = draw(list(range(400)), [0] * 400).double().flatten()
    n = z.numel()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov at about p = 1e-4.
    ordered = torch.special.ndtr(z.sort().values)
    grid = torch.arange(n, dtype=torch.float64) / n
    assert float((ordered - grid).abs().max()) < 2.2 / math.sqrt(n)
    assert float(z.abs().max()) > 4


def test_neighbouring_numbers_are_uncorrelated() -> None:
    z = draw(list(range(100)), [0] * 100).flatten(1)
    half = z.shape[1] // 2
    for lag in (1, 2, half):
        assert abs(float((z[:, lag:] * z[:, :-lag]).mean())) < 5 / math.sqrt(z[:, lag:].numel())


def test_mixer_is_splitmix64() -> None:
    # First output of the reference generator seeded with 1234567.
    state = torch.tensor([1234567], dtype=torch.int64) + (0x9E3779B97F4A7C15 - 2**64)
    assert int(_mix(state)) % 2**64 == 6457827717110365317


def test_odd_sizes_and_scalars() -> None:
    assert keyed_noise((3, 5), **KEY).shape == (3, 5)
    assert keyed_noise((), **KEY).shape == ()
    assert torch.isfinite(keyed_noise((3, 5), **KEY)).all()


def test_generator_is_a_function_of_its_key() -> None:
    def order(step: int) -> list[int]:
        generator = keyed_generator(seed=1, step=step, stream=Stream.WINDOW)
        return torch.randperm(50, generator=generator).tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_bad_keys_are_explained() -> None:
    with pytest.raises(ValueError, match="2 ids, 1 members"):
        draw([1, 2], [0])
    with pytest.raises(ValueError, match="64-bit"):
        keyed_noise((3,), **(KEY | {"seed": 2**64}))
