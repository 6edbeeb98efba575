"""Anonymous battles between models on the same prompts, and ratings with intervals that are resampled by prompt.

Shapes: N samples, P prompts, M models, R bootstrap resamples.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from flow_rl.evaluation.arena import Rating, bradley_terry, ratings_of_many
from flow_rl.evaluation.statistics import expanded_tail
from flow_rl.evaluation.vote_files import read_rows
from flow_rl.files import put_text
from flow_rl.rewards.asking import ask
from flow_rl.rewards.base import Reward, Samples

#: what `PairwiseJudge.compare` says, of the first image
WIN, TIE, LOSS = 1.0, 0.0, -1.0
#: imaginary ties for every pair that met: a clean sweep keeps finite ratings, a hundred battles hardly move
PRIOR = 0.5


@dataclass(frozen=True, kw_only=True)
class Battle:
    """One comparison of two images of the same prompt.

    Attributes:
        prompt: id of the prompt, which is what the intervals resample.
        category: its semantic category.
        first: name of one model.
        second: name of the other.
        credit: of the first: 1 won, 0.5 tied, 0 lost; quarters where a judge of both orders contradicts itself halfway.
    """

    prompt: int
    category: str
    first: str
    second: str
    credit: float

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise ValueError(f"'{self.first}' cannot battle itself (prompt {self.prompt}).")
        if not 0.0 <= self.credit <= 1.0:
            raise ValueError(f"A battle's credit lies between 0 (lost) and 1 (won), received {self.credit}.")


class PairwiseJudge(ABC):
    """Says which of two images is the better answer to a prompt."""

    #: whether the verdict may depend on which image comes first, so that both orders have to be asked
    ordered = True

    @abstractmethod
    def compare(self, first: Samples, second: Samples) -> Tensor:
        """Compare image by image.

        Args:
            first: N images with their prompts.
            second: N other images of the same prompts. Neither says which model made it.

        Returns:
            float32 (N,): `WIN` where the first is better, `TIE`, `LOSS`; NaN where it cannot be judged.
        """


class RewardJudge(PairwiseJudge):
    """A pointwise reward as a judge, such as a vision-language model with its rubric: the higher score wins.

    Args:
        reward: scores each image on its own, so the order cannot matter.
        tie_band: scores closer than this are a tie, in points of the 1..5 scale; 0 calls only equal scores a tie.
    """

    ordered = False

    def __init__(self, reward: Reward, tie_band: float = 0.25) -> None:
        if tie_band < 0:
            raise ValueError(f"tie_band is {tie_band}; it is a difference of scores, 0 or more.")
        self.reward, self.tie_band = reward, tie_band

    @override
    def compare(self, first: Samples, second: Samples) -> Tensor:
        return verdicts(self._score(first) - self._score(second), self.tie_band)

    def _score(self, samples: Samples) -> Tensor:
        return ask(self.reward, samples, type(self.reward).__name__, section=None)


def verdicts(differences: Tensor, tie_band: float) -> Tensor:
    """Score differences of any shape as `WIN`, `TIE` and `LOSS`; NaN stays NaN."""
    signs = torch.where(differences.abs() <= tie_band, TIE, differences.sign())
    return signs.masked_fill(differences.isnan(), torch.nan).float()


def credits(judge: PairwiseJudge, first: Samples, second: Samples) -> Tensor:
    """Credit of the first images, in [0, 1]: the mean over both orders where the order could matter.

    A judge that prefers whatever comes first contradicts itself and so calls every battle a tie.

    Returns:
        float32 (N,), NaN where the judge had no verdict in either order.

    Raises:
        ValueError: samples that are not of the same prompts, or a judge that breaks its contract.
    """
    if list(first.prompts) != list(second.prompts):
        raise ValueError("A battle compares images of the same prompts, in the same order; these differ.")
    found = _checked(judge.compare(first, second), len(first))
    if judge.ordered:
        found = (found - _checked(judge.compare(second, first), len(first))) / 2
    return (found + 1) / 2


def battles_from_values(
    values: Mapping[str, NDArray[np.float64]], ids: Sequence[int], categories: Sequence[str], *, tie_band: float
) -> list[Battle]:
    """Every model against every other on every prompt, judged by scores that are there already.

    Images of the same prompt and the same noise meet.

    Args:
        values: model to scores, shape (P, images a prompt), NaN where there is none; higher is better.
        ids: of the prompts, length P.
        categories: of the prompts, length P.
        tie_band: scores closer than this are a tie, in their own unit.
    """
    battles = []
    for first, second in combinations(values, 2):
        outcome = verdicts(torch.from_numpy(values[first] - values[second]), tie_band)
        for row, image in (~outcome.isnan()).nonzero().tolist():
            credit = (float(outcome[row, image]) + 1) / 2
            battles.append(Battle(prompt=ids[row], category=categories[row], first=first, second=second, credit=credit))
    return battles


def rate(
    battles: Sequence[Battle],
    *,
    names: Sequence[str] | None = None,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Rating]:
    """Bradley-Terry ratings on the Elo scale, with intervals that are resampled by prompt.

    Battles on one prompt go together: a prompt that suits one model suits it in every battle.

    Args:
        battles: of all models with each other, or of enough pairs to connect them.
        names: models in the order wanted; those of the battles if omitted.
        resamples: R, of prompts with replacement.
        level: of the intervals, in (0, 1).
        seed: of the resampling.

    Returns:
        model to rating, in the order of `names`.

    Raises:
        ValueError: no battles, battles of a model that `names` leaves out, models that no battles connect, or fewer
            than two prompts.
    """
    if not battles:
        raise ValueError("There are no battles to rate.")
    if resamples < 100 or not 0 < level < 1:
        raise ValueError(f"resamples ({resamples}) must be at least 100 and level ({level}) between 0 and 1.")
    labels = list(names) if names is not None else list(dict.fromkeys(n for b in battles for n in (b.first, b.second)))
    wins_PMM = _wins_by_prompt(battles, labels)
    if len(wins_PMM) < 2:
        raise ValueError("Intervals that are resampled by prompt need battles on at least 2 prompts.")
    elo = bradley_terry(wins_PMM.sum(axis=0), names=labels, prior=PRIOR).elo
    prompts = len(wins_PMM)
    # How often each prompt is drawn in each resample.
    draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    resampled = ratings_of_many(np.einsum("rp,pij->rij", draws, wins_PMM), prior=PRIOR)
    tail = expanded_tail(prompts, level)
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return {
        name: Rating(elo=float(elo[i]), low=float(min(low[i], elo[i])), high=float(max(high[i], elo[i])))
        for i, name in enumerate(labels)
    }


def rate_by_category(battles: Sequence[Battle], *, names: Sequence[str], seed: int = 0) -> dict[str, dict[str, Rating]]:
    """`rate`, category by category, in the order in which they first occur."""
    categories = dict.fromkeys(battle.category for battle in battles)
    return {c: rate([b for b in battles if b.category == c], names=names, seed=seed) for c in categories}


def write_battles(battles: Iterable[Battle], path: str | Path) -> None:
    """Write battles as JSON Lines, one object a battle with the fields of `Battle`.

    Raises:
        SettingError: a file of votes, or another one that this function did not write, see `put_text`.
    """
    put_text(path, "".join(json.dumps(asdict(battle)) + "\n" for battle in battles))


def read_battles(path: str | Path) -> list[Battle]:
    """Read battles that `write_battles` wrote or people voted on (`flow_rl.evaluation.voting`); other keys are ignored.

    Raises:
        ValueError: a file that is missing, or a line that is no battle; the message says which.
    """
    fields = {"prompt": int, "category": str, "first": str, "second": str, "credit": float}
    battles = []
    for where, row in read_rows(Path(path), fields):
        try:
            battles.append(Battle(**{key: row[key] for key in fields}))
        except ValueError as error:
            raise ValueError(f"{where}: not a battle: {error}") from None
    return battles


def _checked(outcomes: Tensor, count: int) -> Tensor:
    outcomes = outcomes.detach().float().cpu()
    known = torch.isin(outcomes, torch.tensor([WIN, TIE, LOSS])) | outcomes.isnan()
    if outcomes.shape != (count,) or not known.all():
        allowed = f"{WIN:g}, {TIE:g}, {LOSS:g} or NaN"
        raise ValueError(f"A judge must return {count} of {allowed}; received {outcomes.tolist()!s:.120}.")
    return outcomes


def _wins_by_prompt(battles: Sequence[Battle], names: Sequence[str]) -> NDArray[np.float64]:
    """Credits, `out[p, i, j]` of i against j on prompt p, shape (P, M, M)."""
    prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(battle.prompt for battle in battles))}
    column = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(prompts), len(names), len(names)))
    for battle in battles:
        if battle.first not in column or battle.second not in column:
            raise ValueError(f"A battle of '{battle.first}' and '{battle.second}', but the models are {list(names)}.")
        row, i, j = prompts[battle.prompt], column[battle.first], column[battle.second]
        wins[row, i, j] += battle.credit
        wins[row, j, i] += 1 - battle.credit
    return wins
