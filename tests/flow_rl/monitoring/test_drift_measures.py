"""Measures of images, groups, latents and velocities against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch

from flow_rl.monitoring.drift import (
    brightness,
    by_prompt,
    contrast,
    features,
    group_diversity,
    image_measures,
    latent_rms,
    relative_distance,
    saturation,
    sharpness,
)


def flat(red: float, green: float, blue: float, size: int = 8) -> torch.Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float64)[None, :, None, None].expand(1, 3, size, size)


def test_flat_colours_have_known_brightness_and_saturation_and_nothing_else():
    images = torch.cat([flat(1, 0, 0), flat(0, 1, 0), flat(0, 0, 1), flat(0.5, 0.5, 0.5), flat(0.2, 0.9, 0.4)])
    luma = [0.2126, 0.7152, 0.0722, 0.5, 0.2 * 0.2126 + 0.9 * 0.7152 + 0.4 * 0.0722]
    torch.testing.assert_close(brightness(images), torch.tensor(luma, dtype=torch.float64))
    torch.testing.assert_close(saturation(images), torch.tensor([1, 1, 1, 0, 0.7], dtype=torch.float64))
    assert contrast(images).abs().max() < 1e-12
    assert sharpness(images).abs().max() < 1e-12
    assert set(image_measures(images)) == {"brightness", "saturation", "contrast", "sharpness"}


def test_a_chequerboard_has_the_highest_contrast_and_sharpness():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board = ((rows + columns) % 2).double().expand(1, 3, -1, -1)
    assert contrast(board).item() == pytest.approx(0.5)
    assert sharpness(board).item() == pytest.approx(4.0)  # every neighbour is the opposite
    ramp = (columns.double() / 10).expand(1, 3, -1, -1)
    assert sharpness(ramp).item() == pytest.approx(0.0, abs=1e-12)  # the Laplacian of a plane is 0
    assert contrast(ramp).item() == pytest.approx(math.sqrt((8**2 - 1) / 12) / 10)  # of a discrete uniform


def test_sharpness_of_an_image_too_small_is_refused():
    with pytest.raises(ValueError, match="3 x 3"):
        sharpness(torch.zeros(1, 3, 2, 5))


def test_diversity_is_the_mean_pairwise_distance_of_each_prompt():
    images = torch.cat([flat(v, v, v) for v in (0.0, 0.3, 0.9, 0.4, 0.4, 0.4)])
    expected = torch.tensor([(0.3 + 0.9 + 0.6) / 3, 0], dtype=torch.float64)
    torch.testing.assert_close(group_diversity(images, 3), expected)
    assert group_diversity(images, 1).isnan().all()


def test_diversity_does_not_depend_on_the_resolution():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    large = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert features(large).shape == (6, 3 * 32 * 32)
    torch.testing.assert_close(group_diversity(large, 2), group_diversity(images, 2))
    by_hand = [(images[i] - images[i + 1]).square().mean().sqrt() for i in (0, 2, 4)]
    torch.testing.assert_close(group_diversity(images, 2), torch.stack(by_hand))


def test_norms_and_distances():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 16, 32, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(latent_rms(3 * latents), 3 * latents.square().mean(dim=(1, 2)).sqrt())
    torch.testing.assert_close(
        relative_distance(latents * torch.tensor([1, 1.5, 0, -1, 2])[:, None, None], latents),
        torch.tensor([0, 0.5, 1, 2, 1], dtype=torch.float64),
    )


def test_by_prompt_leaves_out_what_is_missing():
    nan = math.nan
    found = by_prompt(torch.tensor([1.0, 3.0, nan, 5.0, nan, nan]), 2)
    torch.testing.assert_close(found, torch.tensor([2.0, 5.0, nan]), equal_nan=True)
