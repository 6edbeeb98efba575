"""How far the student's velocity is from the teacher's, by noise level.

Shapes: M states, ... the latent dimensions, B bins of noise level.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

#: edges of the bins of sigma; the uppermost bin holds sigma = 1
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class VelocityGap(Metric):
    """Relative error and cosine of two velocities, over all noise levels and in bins of them.

    `gap` is the RMS of `v_student - v_teacher` over the RMS of `v_teacher`, each over all entries; `cosine` is the
    mean over the states. Sums are kept, so neither the batch size nor the number of ranks changes a value.
    """

    full_state_update = False

    error: Tensor
    scale: Tensor
    cosine: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("error", "scale", "cosine", "count"):
            self.add_state(name, torch.zeros(len(EDGES) - 1, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, velocity: Tensor, target: Tensor, sigma: Tensor) -> None:
        """Add M states.

        Args:
            velocity: of the student, shape (M, ...).
            target: of the teacher, same shape.
            sigma: noise level of each, in [0, 1], shape (M,).
        """
        velocity, target = velocity.detach().flatten(1).float(), target.detach().flatten(1).float()
        # Edge by edge: a table of the edges would have to be copied to the device.
        bins = torch.zeros_like(sigma, dtype=torch.long)
        for edge in EDGES[1:-1]:
            bins += sigma >= edge
        rows = {
            "error": (velocity - target).square().mean(dim=1),
            "scale": target.square().mean(dim=1),
            "cosine": torch.nn.functional.cosine_similarity(velocity, target, dim=1),
            "count": torch.ones_like(sigma),
        }
        for name, values in rows.items():
            state = getattr(self, name)
            state.index_add_(0, bins.to(state.device), values.to(state))

    @override
    def compute(self) -> dict[str, float]:
        """`gap` and `cosine`, and `gap/sigma_a_b` and `cosine/sigma_a_b` of every bin that has states."""
        # One copy to the host, for which it waits, instead of one a number.
        error, scale, cosine, count = torch.stack([self.error, self.scale, self.cosine, self.count]).cpu().unbind()
        if not bool(count.sum() > 0):
            return {}
        values = {"gap": _ratio(error.sum(), scale.sum()), "cosine": float(cosine.sum() / count.sum())}
        for index in count.nonzero()[:, 0].tolist():
            name = f"sigma_{EDGES[index]:.1f}_{EDGES[index + 1]:.1f}"
            values[f"gap/{name}"] = _ratio(error[index], scale[index])
            values[f"cosine/{name}"] = float(cosine[index] / count[index])
        return values


def _ratio(error: Tensor, scale: Tensor) -> float:
    return float((error / scale.clamp_min(torch.finfo(scale.dtype).tiny)).sqrt())
