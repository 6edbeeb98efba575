"""How far a reward model agrees with human scores: torchmetrics that are right across ranks.

Shapes: N scored images, K bins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import mean_squared_error, pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN

#: two scores closer than this are the same score: float32 sums differ by less
SAME_SCORE = 1e-4
#: stands for the images of all categories together
ALL = "all"
_NO_GROUP = -1


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """The calibration curve: what was predicted against what was true, by bins of the prediction.

    Attributes:
        centres: middle of each bin, shape (K,).
        predicted: mean prediction in each bin, NaN in an empty one, shape (K,).
        truth: mean human score in each bin, NaN in an empty one, shape (K,).
        counts: images in each bin, int64 (K,).
    """

    centres: Tensor
    predicted: Tensor
    truth: Tensor
    counts: Tensor

    @property
    def error(self) -> Tensor:
        """Mean distance of the curve from the diagonal, weighted by counts; NaN if nothing was scored."""
        distance = (self.predicted - self.truth).abs().nan_to_num()
        return (distance * self.counts).sum() / self.counts.sum()


class Agreement(Metric):
    """All figures of one dimension; `compute()` returns them by name.

    - `srcc`, `plcc`: rank and linear correlation; NaN where either side is constant.
    - `mse`: mean squared error, in squared points of the 1..5 scale.
    - `pairwise_accuracy`: of the pairs of images with different human scores, the share that the model orders alike;
      two equal predictions count half.
    - `pairwise_accuracy_ties`: of all pairs, the share where the model says the same of better, worse and tied;
      predictions closer than `tie_margin` are a tie.
    - `calibration_error`: see `Reliability`.
    - `pairwise_accuracy_in_group`: `pairwise_accuracy` over the pairs inside a group alone, which is what RL by groups
      learns from; NaN without such pairs.
    - `identical_in_group`: of the pairs of images in one group, the share with the same prediction (such a pair teaches
      RL nothing); NaN without groups.
    - `parse_rate`: share of images with a score. Those without are left out of everything else.
    - `count`: images.

    Args:
        tie_margin: in points of the 1..5 scale.
        bins: K, bins of the reliability curve over [1, 5].
    """

    full_state_update = False
    higher_is_better = True
    predictions: list[Tensor]
    truths: list[Tensor]
    groups: list[Tensor]

    def __init__(self, *, tie_margin: float = 0.5, bins: int = 8) -> None:
        super().__init__()
        if tie_margin <= 0 or bins < 1:
            raise ValueError(f"tie_margin ({tie_margin}) must be positive and bins ({bins}) at least 1.")
        self.tie_margin, self.bins = tie_margin, bins
        for name in ("predictions", "truths", "groups"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._fill()

    def _fill(self) -> None:
        # A rank that saw nothing must still bring tensors of the right type to the gathering.
        self.update(torch.zeros(0), torch.zeros(0), [])

    @override
    def reset(self) -> None:
        super().reset()
        self._fill()

    @override
    def update(self, predictions: Tensor, truths: Tensor, groups: Sequence[int | str | None]) -> None:
        """Add images.

        Args:
            predictions: R, NaN where none could be read, shape (N,).
            truths: human scores in [1, 5], shape (N,).
            groups: what competes with each other; None for an image on its own. Length N.
        """
        self.predictions.append(predictions.detach().to(self.device, torch.float32))
        self.truths.append(truths.detach().to(self.device, torch.float32))
        self.groups.append(torch.tensor([_group_id(g) for g in groups], dtype=torch.int64, device=self.device))

    def scored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions, truths and groups of the images that have a prediction."""
        predictions, truths, groups = (dim_zero_cat(s) for s in (self.predictions, self.truths, self.groups))
        kept = ~predictions.isnan()
        return predictions[kept], truths[kept], groups[kept]

    @override
    def compute(self) -> dict[str, Tensor]:
        predictions, truths, groups = self.scored()
        total = dim_zero_cat(self.predictions).numel()
        nothing = predictions.new_tensor(torch.nan)
        with_ties, without_ties = pairwise_accuracy(predictions, truths, tie_margin=self.tie_margin)
        return {
            "srcc": correlation(predictions, truths, ranks=True),
            "plcc": correlation(predictions, truths, ranks=False),
            "mse": mean_squared_error(predictions, truths) if len(predictions) else nothing,
            "pairwise_accuracy": without_ties,
            "pairwise_accuracy_ties": with_ties,
            "pairwise_accuracy_in_group": pairwise_accuracy_in_group(predictions, truths, groups),
            "calibration_error": reliability(predictions, truths, bins=self.bins).error,
            "identical_in_group": identical_in_group(predictions, groups),
            "parse_rate": predictions.new_tensor(len(predictions) / total) if total else nothing,
            "count": predictions.new_tensor(float(total)),
        }


def agreement_by_category(
    predictions: Tensor, truths: Tensor, groups: Sequence[int | str | None], categories: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The figures of `Agreement`, by category, after those of all images under `ALL`.

    Args:
        predictions: NaN where none could be read, shape (N,).
        truths: shape (N,).
        groups: see `Agreement.update`, length N.
        categories: length N.
    """
    found = {}
    for name in (ALL, *dict.fromkeys(categories)):
        rows = [row for row, category in enumerate(categories) if name in (ALL, category)]
        metric = Agreement()
        metric.update(predictions[rows], truths[rows], [groups[row] for row in rows])
        found[name] = {key: float(value) for key, value in metric.compute().items()}
    return found


def correlation(predictions: Tensor, truths: Tensor, *, ranks: bool) -> Tensor:
    """Spearman's (ranks) or Pearson's correlation of two (N,) tensors; NaN where one is constant or N < 2."""
    if len(predictions) < 2 or predictions.max() == predictions.min() or truths.max() == truths.min():
        return predictions.new_tensor(torch.nan)
    measure = spearman_corrcoef if ranks else pearson_corrcoef
    # In float64: torchmetrics warns, and is wrong, where a variance is tiny.
    return measure(predictions.double(), truths.double()).float()


def pairwise_accuracy(predictions: Tensor, truths: Tensor, *, tie_margin: float) -> tuple[Tensor, Tensor]:
    """Share of pairs that predictions and truths order alike.

    Args:
        predictions: shape (N,).
        truths: shape (N,).
        tie_margin: predictions closer than this are a tie, in the first measure alone.

    Returns:
        (with ties, without ties): over all pairs as better / worse / tied, and over the pairs whose truths differ,
        where two equal predictions count half. NaN without such pairs.
    """
    alike = ordered = torch.zeros((), dtype=torch.float64, device=predictions.device)
    pairs = untied = 0
    for i in range(len(predictions) - 1):  # row by row: N x N would not fit for a large set
        difference = predictions[i + 1 :] - predictions[i]
        wanted = torch.sign(truths[i + 1 :] - truths[i])
        found = torch.sign(difference)
        alike = alike + (torch.where(difference.abs() < tie_margin, 0.0, found) == wanted).sum()
        differs = wanted != 0
        half = torch.where(difference.abs() < SAME_SCORE, 0.5, (found == wanted).double())
        ordered = ordered + half[differs].sum()
        pairs += len(difference)
        untied += int(differs.sum())
    nothing = predictions.new_tensor(torch.nan)
    with_ties = (alike / pairs).float() if pairs else nothing
    return with_ties, (ordered / untied).float() if untied else nothing


def reliability(predictions: Tensor, truths: Tensor, *, bins: int) -> Reliability:
    """The calibration curve of predictions (N,) against truths (N,), in `bins` equal bins over [1, 5]."""
    width = (SCORE_MAX - SCORE_MIN) / bins
    index = ((predictions - SCORE_MIN) / width).long().clamp(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.int64, device=predictions.device).scatter_add_(
        0, index, torch.ones_like(index)
    )
    zeros = torch.zeros(bins, device=predictions.device)
    return Reliability(
        centres=SCORE_MIN + width * (torch.arange(bins, device=predictions.device) + 0.5),
        predicted=zeros.scatter_add(0, index, predictions) / counts,
        truth=zeros.scatter_add(0, index, truths) / counts,
        counts=counts,
    )


def pairwise_accuracy_in_group(predictions: Tensor, truths: Tensor, groups: Tensor) -> Tensor:
    """Share of the pairs within a group, of different truths, that predictions order alike; NaN without such a pair.

    Args:
        predictions: shape (N,); two equal ones count half.
        truths: shape (N,).
        groups: int64 (N,); -1 for an image on its own.
    """
    device = predictions.device
    predictions, truths, groups = predictions.cpu(), truths.cpu(), groups.cpu()  # many small steps follow
    right = pairs = 0.0
    for group in groups[groups != _NO_GROUP].unique():
        rows = groups == group
        values, wanted = predictions[rows], truths[rows]
        better = (wanted[:, None] - wanted[None]) > SAME_SCORE
        difference = values[:, None] - values[None]
        found = torch.where(difference.abs() < SAME_SCORE, 0.5, (difference > 0).double())
        right += float(found[better].sum())
        pairs += int(better.sum())
    return torch.tensor(right / pairs if pairs else torch.nan, device=device)


def identical_in_group(predictions: Tensor, groups: Tensor) -> Tensor:
    """Share of the pairs within a group that have the same prediction; NaN without a group of two.

    Args:
        predictions: shape (N,).
        groups: int64 (N,); -1 for an image on its own.
    """
    same = pairs = 0
    for group in groups[groups != _NO_GROUP].unique():
        values = predictions[groups == group]
        upper = torch.ones(len(values), len(values), dtype=torch.bool, device=values.device).triu(1)
        same += int(((values[:, None] - values[None]).abs() < SAME_SCORE)[upper].sum())
        pairs += int(upper.sum())
    return predictions.new_tensor(same / pairs if pairs else torch.nan)


def _group_id(group: int | str | None) -> int:
    """A stable 62-bit id: texts can't be gathered across ranks."""
    if group is None:
        return _NO_GROUP
    digest = hashlib.sha256(f"{type(group).__name__}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
