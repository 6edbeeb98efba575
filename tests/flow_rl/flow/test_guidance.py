"""Guidance: the extrapolation, the preserved norm, the interval."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flow_rl.flow.guidance import Guidance, guide


@pytest.fixture
def branches() -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)))


def test_extrapolates_from_the_unconditional_branch(branches: tuple[Tensor, Tensor]) -> None:
    c, u = branches
    expected = -1.5 * u.double() + 2.5 * c.double()
    torch.testing.assert_close(guide(c, u, 2.5).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guide(c, u, 0.0), u)


@pytest.mark.parametrize("rescale", [False, True])
def test_scale_one_is_the_conditional_branch(branches: tuple[Tensor, Tensor], rescale: bool) -> None:
    c, u = branches
    assert torch.equal(guide(c, u, 1.0, rescale=rescale), c)


def test_rescaling_keeps_each_token_norm_and_direction(branches: tuple[Tensor, Tensor]) -> None:
    c, u = branches
    plain, rescaled = guide(c, u, 4.0), guide(c, u, 4.0, rescale=True)
    torch.testing.assert_close(rescaled.norm(dim=-1), c.norm(dim=-1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(torch.cosine_similarity(plain, rescaled, dim=-1), torch.ones(3, 16), rtol=1e-5, atol=0.0)
    assert not torch.allclose(plain.norm(dim=-1), c.norm(dim=-1), rtol=0.1)


def test_cancelled_token_stays_zero() -> None:
    c, u = torch.ones(1, 1, 4), torch.full((1, 1, 4), 2.0)
    assert torch.equal(guide(c, u, 2.0, rescale=True), torch.zeros(1, 1, 4))


def test_bfloat16_branches_are_combined_in_float32(branches: tuple[Tensor, Tensor]) -> None:
    c, u = (t.bfloat16() for t in branches)
    assert torch.equal(guide(c, u, 4.0), guide(c.float(), u.float(), 4.0))


def test_interval_is_open_below_and_closed_above() -> None:
    guidance = Guidance(scale=2.5, low=0.6, high=0.9)
    assert [guidance.active(s) for s in (1.0, 0.9, 0.75, 0.6, 0.1)] == [False, True, True, False, False]
    assert Guidance(scale=2.5).active(1.0)
    assert not Guidance(scale=1.0).active(0.5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": 2.0, "low": 0.8, "high": 0.5}, "low=0.8, high=0.5"),
        ({"scale": 2.0, "high": 1000.0}, "high=1000.0"),
    ],
)
def test_bad_guidance_is_explained(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**bad)


def test_branches_must_have_one_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 8\) and \(2, 5, 8\)"):
        guide(torch.zeros(2, 4, 8), torch.zeros(2, 5, 8), 2.0)
