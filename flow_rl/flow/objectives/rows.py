"""What the losses share: one number a row, checked and reduced.

Shapes: N rows, a row being one (sample, step) pair; ... the latent dimensions.
"""

from __future__ import annotations

from torch import Tensor

from flow_rl.flow.broadcast import as_column

Metrics = dict[str, Tensor]


def reduce_rows(row_losses: Tensor, weights: Tensor | None, denominator: float | None) -> Tensor:
    """The (weighted) mean of losses (N,), or their sum over `denominator`."""
    if weights is not None:
        row_losses = row_losses * weights.detach().float()
    if denominator is None:
        return row_losses.mean()
    check_positive(denominator=denominator)
    return row_losses.sum() / denominator


def one_per_row(value: float | Tensor, rows: Tensor, name: str) -> Tensor:
    """A number a row, shape (N,) or (); accepts a transition's (N, 1, ..., 1) std."""
    if isinstance(value, Tensor):
        value = value.detach().reshape(-1) if value.numel() > 1 else value.detach().reshape(())
    return as_column(value, rows, name)


def check_rows(first: Tensor, **others: Tensor | None) -> None:
    """Refuse shapes other than (N,): (N, 1) beside (N,) would broadcast to an N x N loss without a word."""
    if first.ndim != 1:
        raise ValueError(f"Expected one value a row, shape (N,); received shape {tuple(first.shape)}.")
    check_same_shape(first, **others)


def check_same_shape(first: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors, by name, of another shape than the first; None is left out."""
    for name, other in others.items():
        if other is not None and other.shape != first.shape:
            raise ValueError(f"{name} must have shape {tuple(first.shape)}, received {tuple(other.shape)}.")


def check_positive(**values: float) -> None:
    """Refuse numbers, by name, that are not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, received {value}.")
