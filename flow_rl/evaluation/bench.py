"""A bench in the style of Qwen-Image-Bench: facets, second levels, pillars, overall; every mean from the bottom up.

The scores are those that `train.py test` leaves in `test_scores.jsonl`; a tree (`BenchTree`) says which score is a
facet of what. A facet that does not apply to an image (no score) is left out of the means above it, never zero.

Shapes: P prompts, M images a prompt.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flow_rl.evaluation.statistics import Interval, bootstrap_mean, paired_gain
from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN
from flow_rl.strict_yaml import parse, read_text
from flow_rl.suggestions import nearest

OVERALL = "overall"
#: a score of 1..5 as points of the bench: 0 to 100, as the published tables print them
POINTS = 100.0 / (SCORE_MAX - SCORE_MIN)


@dataclass(frozen=True, kw_only=True)
class BenchTree:
    """Which scores a task's pillars are made of.

    Attributes:
        pillars: pillar to second level to the names of its facets, which are names of scores, such as
            `judge/colour`. A facet may stand in one place only.
    """

    pillars: Mapping[str, Mapping[str, Sequence[str]]]

    def __post_init__(self) -> None:
        if not self.pillars or not all(self.pillars.values()) or OVERALL in self.pillars:
            raise ValueError(
                f"A bench needs at least one pillar, none without facets and none called '{OVERALL}'; received "
                f"{dict(self.pillars)}."
            )
        facets = self.facets()
        twice = sorted({name for name in facets if facets.count(name) > 1})
        if twice:
            raise ValueError(f"{twice} stand in several places of the bench: each score may count once.")

    def facets(self) -> list[str]:
        """Names of all scores, in the order of the tree."""
        return [name for levels in self.pillars.values() for names in levels.values() for name in names]

    @classmethod
    def load(cls, path: str | Path) -> BenchTree:
        """Read a YAML file: pillar, second level, list of scores.

        Raises:
            ValueError: a file that is missing or has another shape.
        """
        try:
            tree = parse(read_text(path), str(path))
        except OSError as error:
            raise ValueError(f"Cannot read the bench '{path}': {error}.") from None
        if not isinstance(tree, dict) or not all(_is_pillar(levels) for levels in tree.values()):
            raise ValueError(f"'{path}' must map pillars to second levels to lists of scores; received {tree!r:.200}.")
        return cls(pillars=tree)


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """One model's scores on the prompts of a test.

    Attributes:
        ids: of the prompts, ascending, length P.
        prompts: their texts, length P.
        categories: their semantic categories, length P.
        scores: score name to points in 0..100, NaN where none was given, float64 (P, M).
    """

    ids: tuple[int, ...]
    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    scores: Mapping[str, NDArray[np.float64]]

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Read `test_scores.jsonl`.

        Raises:
            ValueError: a file that is missing, empty or cut off, or prompts with different numbers of images.
        """
        rows = _read_rows(Path(path))
        by_prompt: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            by_prompt.setdefault(row["id"], []).append(row)
        ids = sorted(by_prompt)
        members = {len(by_prompt[i]) for i in ids}
        if len(members) != 1:
            raise ValueError(f"'{path}' has prompts with {sorted(members)} images: expected the same number for each.")
        names = list(rows[0]["scores"])
        ordered = [sorted(by_prompt[i], key=lambda row: row["member"]) for i in ids]
        return cls(
            ids=tuple(ids),
            prompts=tuple(found[0]["prompt"] for found in ordered),
            categories=tuple(found[0]["category"] for found in ordered),
            scores={name: _matrix(ordered, name) for name in names},
        )

    def select(self, category: str) -> ScoreTable:
        """The prompts of one category."""
        index = [i for i, c in enumerate(self.categories) if c == category]
        return ScoreTable(
            ids=tuple(self.ids[i] for i in index),
            prompts=tuple(self.prompts[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            scores={name: values[index] for name, values in self.scores.items()},
        )


def image_values(table: ScoreTable, tree: BenchTree) -> dict[str, NDArray[np.float64]]:
    """Every node's value of every image, from the facets up.

    A node is the plain mean of those of its children that apply to the image.

    Returns:
        by name: facets by their score's name, second levels as `pillar/level`, pillars, and `overall`; points in
        0..100, NaN where nothing below applies, each (P, M).

    Raises:
        ValueError: the tree names a score that the table has not; the nearest one is named.
    """
    for name in tree.facets():
        if name not in table.scores:
            hint = nearest(name, table.scores)
            raise ValueError(f"The bench names '{name}', which was not scored.{hint} Scored: {sorted(table.scores)}.")
    values: dict[str, NDArray[np.float64]] = {}
    for pillar, levels in tree.pillars.items():
        for level, names in levels.items():
            values |= {name: table.scores[name] for name in names}
            values[f"{pillar}/{level}"] = _mean_of_those_that_apply([table.scores[name] for name in names])
        values[pillar] = _mean_of_those_that_apply([values[f"{pillar}/{level}"] for level in levels])
    return values | {OVERALL: _mean_of_those_that_apply([values[pillar] for pillar in tree.pillars])}


def prompt_values(table: ScoreTable, tree: BenchTree) -> dict[str, NDArray[np.float64]]:
    """`image_values`, averaged over the images of each prompt: (P,), NaN where no image has a value."""
    return {
        name: _mean_of_those_that_apply(list(np.moveaxis(matrix, 1, 0)))
        for name, matrix in image_values(table, tree).items()
    }


def bench(tables: Mapping[str, ScoreTable], tree: BenchTree, *, seed: int = 0) -> dict[str, dict[str, Interval]]:
    """The table of the bench.

    Args:
        tables: model to its scores; all on the same prompts.
        tree: what to average.
        seed: of the bootstrap.

    Returns:
        node (pillars in their order, `overall`, then second levels and facets) to model to its mean in points with a
        95 % interval that is resampled by prompt. A node that applies to fewer than two prompts is left out.

    Raises:
        ValueError: models that were tested on different prompts, or a score that is not there.
    """
    check_same_prompts(tables)
    values = {model: prompt_values(table, tree) for model, table in tables.items()}
    nodes = [*tree.pillars, OVERALL]
    nodes += [f"{pillar}/{level}" for pillar, levels in tree.pillars.items() for level in levels]
    nodes += tree.facets()
    found: dict[str, dict[str, Interval]] = {}
    for node in nodes:
        row = {
            model: bootstrap_mean(each[node], seed=seed)
            for model, each in values.items()
            if np.isfinite(each[node]).sum() >= 2
        }
        if row:
            found[node] = row
    return found


def gain(
    before: ScoreTable, after: ScoreTable, tree: BenchTree, *, node: str = OVERALL, category: str | None = None
) -> Interval:
    """Change of one node from a model to another on the same prompts, in points, with its paired interval.

    Args:
        before: scores of the first model.
        after: scores of the second.
        tree: what to average.
        node: of the tree.
        category: count its prompts alone.

    Raises:
        ValueError: different prompts, or fewer than two that both models have a value for.
    """
    check_same_prompts({"before": before, "after": after})
    if category is not None:
        before, after = before.select(category), after.select(category)
    return paired_gain(prompt_values(before, tree)[node], prompt_values(after, tree)[node])


def check_same_prompts(tables: Mapping[str, ScoreTable]) -> None:
    """Refuse to compare models that were tested on different prompts.

    Raises:
        ValueError: naming two such models.
    """
    if not tables:
        raise ValueError("No models to compare: give at least one table of scores.")
    first = next(iter(tables))
    for model, table in tables.items():
        if (table.ids, table.prompts) != (tables[first].ids, tables[first].prompts):
            raise ValueError(
                f"'{first}' and '{model}' were not tested on the same prompts ({len(tables[first].ids)} and "
                f"{len(table.ids)}): test every model with the same data settings."
            )


def _is_pillar(levels: Any) -> bool:
    lists = levels.values() if isinstance(levels, dict) else [None]
    return all(isinstance(names, list) and names and all(isinstance(n, str) for n in names) for names in lists)


def _mean_of_those_that_apply(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mean over a list of equal arrays, NaN left out; NaN where all are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mean of empty slice")
        return np.nanmean(np.stack(parts), axis=0)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise ValueError(f"No scores '{path}': run `python train.py test` on the model first.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is no JSON Lines file ({error}): test the model again.") from None
    if not rows:
        raise ValueError(f"'{path}' is empty: test the model again.")
    return rows


def _matrix(ordered: Sequence[Sequence[Mapping[str, Any]]], name: str) -> NDArray[np.float64]:
    values = [[row["scores"][name] for row in found] for found in ordered]
    return (np.array(values, dtype=np.float64) - SCORE_MIN) * POINTS
