"""Floating-point operations of transformer forwards, counted from shapes: a multiply and an add are two.

Only matrix products count, as in published utilisations: projections and attention. Everything else is a fraction of a
per cent at real sizes.

A training step cannot use `torch.utils.flop_counter`, by which this count is tested. It watches every operation: a
step of the demo's transformer takes three times as long under it (0.35 s and 1.08 s on one CPU core). A count from
shapes takes a millisecond a forward. Torch's counter also counts what gradient checkpointing recomputes, which a
model's utilisation must leave out.

Shapes: N samples, L layers, D channels of all heads together.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of a forward, and of the backward that may follow.

    Attributes:
        forward: of the forward.
        backward: of the gradients of inputs and trainable weights.
    """

    forward: float
    backward: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(forward=self.forward + other.forward, backward=self.backward + other.backward)


def projections(module: nn.Module, rows: int, *, input_gradient: bool = True) -> Flops:
    """All linear layers in a module, each applied to `rows` rows; an adapter's two factors are layers like any.

    The gradient of the inputs costs what the forward does, that of a weight as much again where it is trained.

    Args:
        module: with `nn.Linear` inside, or one itself.
        rows: N times the tokens that go through it.
        input_gradient: whether the inputs need a gradient; what embeds data does not.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    # Not numel of the weight: quantised weights are packed.
    size = {layer: 2 * layer.in_features * layer.out_features * rows for layer in layers}
    trained = sum(size[layer] for layer in layers if layer.weight.requires_grad)
    return Flops(forward=sum(size.values()), backward=trained + (sum(size.values()) if input_gradient else 0))


def attention(channels: int, layers: int, pairs: int) -> Flops:
    """Scores and weighted values of every (query, key) pair; the backward makes four products of these two.

    Args:
        channels: D.
        layers: L.
        pairs: queries times keys, over all N samples, those behind a mask included where they are computed.
    """
    forward = 4.0 * channels * layers * pairs
    return Flops(forward=forward, backward=2 * forward)
