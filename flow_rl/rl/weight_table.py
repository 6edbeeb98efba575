"""Weights of the rewards by semantic category: each kind of prompt has its own vector (arXiv 2606.27608, section 3).

Shapes: N samples, C rows of a table, K rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from flow_rl.rl.reward_weights import WeightSource, check_shares
from flow_rl.strict_yaml import load
from flow_rl.suggestions import nearest

#: the row of categories that have none of their own
DEFAULT = "default"

#: weights by category and reward
Rows = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class WeightTable:
    """A weight vector for each category of one task.

    Attributes:
        rewards: of the task, length K.
        categories: of the rows, length C; `default` is the row of all others.
        values: rows that are non-negative and sum to 1, float64 (C, K).
    """

    rewards: tuple[str, ...]
    categories: tuple[str, ...]
    values: Tensor

    @classmethod
    def build(
        cls, rows: Rows, rewards: Sequence[str], categories: Iterable[str], *, where: str = "table"
    ) -> WeightTable:
        """Check what a user wrote.

        Args:
            rows: weights by reward, by category.
            rewards: those that are asked about the task's samples; a row names each of them.
            categories: those that the data have.
            where: what messages call the table.

        Raises:
            ValueError: a category or reward that nobody knows, a reward or category without a weight, a weight that is
                negative, or a row that does not sum to 1.
        """
        known = sorted(set(categories))
        for name, row in rows.items():
            if name != DEFAULT and name not in known:
                raise ValueError(
                    f"{where} has a row for '{name}'; the categories of the prompts are "
                    f"{', '.join(known)}.{nearest(name, [*known, DEFAULT])}"
                )
            _check_row(row, rewards, f"{where}.{name}")
        without = [name for name in known if name not in rows]
        if without and DEFAULT not in rows:
            raise ValueError(
                f"{where} has no row for {', '.join(without)}, and no row '{DEFAULT}' for categories without one. Add "
                "either."
            )
        values = torch.tensor([[float(row[r]) for r in rewards] for row in rows.values()], dtype=torch.float64)
        return cls(rewards=tuple(rewards), categories=tuple(rows), values=values)

    def row_of(self, category: str) -> int:
        """The row that a category's samples are weighed by.

        Raises:
            ValueError: a category without a row, where there is no default.
        """
        for name in (category, DEFAULT):
            if name in self.categories:
                return self.categories.index(name)
        raise ValueError(f"No weights for the category '{category}': the rows are {', '.join(self.categories)}.")


class TableWeights(WeightSource):
    """Weights by category, that may move while a run goes on.

    Args:
        tables: for each task, what was configured.

    Attributes:
        tables: the same.
        current: for each task, the weights in force, float64 (C, K), rows as in the table.
    """

    def __init__(self, tables: Mapping[str, WeightTable]) -> None:
        self.tables = dict(tables)
        self.current = {task: table.values.clone() for task, table in self.tables.items()}

    def configured(self) -> TableWeights:
        """The same tables as they were before anything moved."""
        return TableWeights(self.tables)

    @override
    def weights(self, categories: Sequence[str], tasks: Sequence[str], reward_names: Sequence[str]) -> Tensor:
        """See `WeightSource.weights`.

        Raises:
            ValueError: a task without a table, or a category without a row.
        """
        rows: dict[tuple[str, str], Tensor] = {}
        for key in dict.fromkeys(zip(tasks, categories, strict=True)):
            task, category = key
            if task not in self.tables:
                raise ValueError(f"No weight table for '{task}' samples: there is one for {', '.join(self.tables)}.")
            table = self.tables[task]
            held = dict(zip(table.rewards, self.current[task][table.row_of(category)].tolist(), strict=True))
            rows[key] = torch.tensor([held.get(name, 0.0) for name in reward_names])
        return torch.stack([rows[key] for key in zip(tasks, categories, strict=True)])


def read_rows(source: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A table as it was written: a mapping, the YAML file that holds one, or such a file by task.

    Raises:
        ValueError: no such file, or one that is no mapping.
    """
    if not isinstance(source, str):
        return {name: read_rows(rows) if isinstance(rows, str) else rows for name, rows in source.items()}
    path = Path(source)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise ValueError(
            f"No weight table '{source}'.{near} `train.py curate --curation.propose={source}` suggests one."
        )
    rows = load(path)
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"'{source}' must map categories to weights by reward; received {rows!r:.80}.")
    return rows


def is_by_task(rows: Mapping[str, Any]) -> bool:
    """Tell whether a table holds one table a task rather than rows."""
    return any(
        isinstance(value, Mapping) for row in rows.values() if isinstance(row, Mapping) for value in row.values()
    )


def _check_row(row: Any, rewards: Sequence[str], where: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must map rewards to weights, received {row!r:.80}.")
    for name, weight in row.items():
        if name not in rewards:
            raise ValueError(
                f"{where} names '{name}'; the rewards are {', '.join(rewards)}.{nearest(str(name), rewards)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"{where}.{name} must be a number, received {weight!r}.")
    missing = [name for name in rewards if name not in row]
    if missing:
        raise ValueError(f"{where} has no entry for {', '.join(missing)} (0 switches a reward off).")
    check_shares(row, where)
