"""The meter against bytes that are counted by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from flow_rl.planning.meter import hollow, metered

KB = 256 * 4  # a row of 256 float32


def test_what_lives_is_counted_once_and_until_nobody_holds_it() -> None:
    with metered() as meter:
        x = hollow(1, 256)
        y = x.exp()
        view = y[0, :8]
        assert meter.live == 2 * KB
        del y
        assert meter.live == 2 * KB  # the view holds it
        del view
        assert meter.live == KB
        assert meter.peak == 2 * KB


def test_autograd_holds_what_it_needs_and_no_more() -> None:
    weight = nn.Parameter(torch.empty(256, 256, device="meta"))
    with metered() as meter:
        meter.disregard([weight])

        def forward() -> torch.Tensor:
            hidden = functional.linear(hollow(1, 256), weight)  # keeps its input
            return hidden.exp().sum()  # keeps the output of exp; nobody needs `hidden`

        loss, reading = meter.read(forward)
        assert reading.kept == 2 * KB + 4
        assert reading.peak == 3 * KB + 4  # the sum is made while `hidden` still has its name
        assert reading.flops == 2 * 256 * 256
        _, backward = meter.read(lambda: torch.autograd.backward([loss]))
        assert backward.flops == 2 * 256 * 256  # of the weight alone: the input needs none
        # What is left is the weight's gradient, and the loss with no graph behind it.
        assert meter.live == 256 * KB + 4


def test_readings_nest() -> None:
    with metered() as meter:
        _, outer = meter.read(lambda: (hollow(2, 256), meter.read(lambda: hollow(3, 256).exp())[1])[1])
        assert outer.peak == (2 + 6) * KB
        assert outer.kept == 0


def test_attention_keeps_what_a_fused_kernel_keeps() -> None:
    with metered() as meter:
        query, key, value = (hollow(1, 2, n, 64).requires_grad_() for n in (8, 16, 16))
        before = meter.live
        made = functional.scaled_dot_product_attention(query, key, value)
        assert meter.live - before == 2 * 8 * (64 + 1) * 4  # the output, and a number a row: no 8 x 16 scores
        assert meter.flops == 2 * 2 * 2 * 8 * 16 * 64
        made.sum().backward()
        assert query.grad.shape == query.shape
    assert functional.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 4) for _ in range(3))).sum() == 8


def test_integers_keep_their_values_and_masks_decide_shapes() -> None:
    with metered() as meter:
        device = hollow(1).device
        mask = torch.arange(8, device=device) >= 5
        assert mask.tolist() == [False] * 5 + [True] * 3
        assert hollow(8, 256)[mask].shape == (3, 256)
        assert torch.zeros(3, dtype=torch.long).to(device).tolist() == [0, 0, 0]
        live = meter.live
        assert hollow(4, 256).cpu().device.type == "cpu"
        assert meter.live == live  # what is on the host is not on this device
