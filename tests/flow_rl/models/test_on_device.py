"""Inputs made on the device: the values that the obvious indexing gives, without asking the device for any."""

from __future__ import annotations

import pytest
import torch

from flow_rl.models.on_device import a_sample, mask_on, samples_of, valid_tokens

CPU, META = torch.device("cpu"), torch.device("meta")  # on meta there are no values to ask for


def test_one_noise_level_or_one_a_sample() -> None:
    latents = torch.zeros(3, 4, 2)
    for sigma in (0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)):
        assert torch.equal(a_sample(sigma, latents), torch.full((3,), 0.1))
    each = torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(a_sample(each, latents), each)
    assert a_sample(0.1, latents.to(META)).device == META


@pytest.mark.parametrize("rows", [[1, 1, 1], [0, 2, 1, 1]])
def test_rows_of_prompts(rows: list[int]) -> None:
    values = torch.randn(3, 5, 2)
    assert torch.equal(samples_of(values, rows), values[rows])
    assert samples_of(values.to(META), rows).shape == values[rows].shape


@pytest.mark.parametrize("mask", [[False] * 4, [True] * 3, [False, True, True, False, True]])
def test_masks_are_filled_run_by_run(mask: list[bool]) -> None:
    assert mask_on(CPU, mask).tolist() == mask
    assert mask_on(META, mask).shape == (len(mask),)


def test_padding_on_the_right() -> None:
    assert valid_tokens([4, 4], CPU) is None
    assert valid_tokens([1, 3, 2], CPU).tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert valid_tokens([1, 3], META).shape == (2, 3)
