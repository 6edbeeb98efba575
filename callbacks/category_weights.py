"""A weight vector a category over the task's rewards.

Shapes: N samples, C rows of a table, K rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from datamodules.prompts import data_by_task
from flow_rl.rl.iteration import Iteration
from flow_rl.rl.weight_adaptation import AdaptationSettings, adapted, smoothed_means
from flow_rl.rl.weight_table import TableWeights, WeightTable, is_by_task, read_rows

Row = dict[str, float]


class CategoryWeightCalibration(Callback):
    """Weighs the rewards of each category as a table says, instead of all alike.

    The policy logs the weights in force as `weight/<category>/<reward>`, and as `weight_effective/...` what masked
    rewards leave of them. With `adapt` they move slowly towards the rewards with headroom, inside a trust region around
    the table.

    Args:
        table: weights by category and reward, or a YAML file of them; a row `default` serves the categories without
            one. With several tasks, one such table or file by task.
        adapt: how the weights move; None keeps them.

    Raises:
        ValueError: a table that is not there.
    """

    def __init__(
        self,
        table: str | dict[str, Row] | dict[str, dict[str, Row]] | dict[str, str],
        adapt: AdaptationSettings | None = None,
    ) -> None:
        self.rows = read_rows(table)
        self.adapt = adapt
        self.source: TableWeights | None = None
        #: running mean scores of each task, float64 (C, K); NaN where none was seen
        self.means: dict[str, Tensor] = {}

    def source_for(self, rewards: Mapping[str, Iterable[str]], categories: Mapping[str, Iterable[str]]) -> TableWeights:
        """The table as a source of weights.

        Args:
            rewards: by task, those that are asked about its samples.
            categories: by task, those of its prompts.

        Raises:
            ValueError: see `WeightTable.build`; a task without a table.
        """
        by_task = self.rows if is_by_task(self.rows) else dict.fromkeys(categories, self.rows)
        for task in categories:
            if task not in by_task:
                raise ValueError(f"The weight table is for {', '.join(by_task)}; the data have '{task}' prompts, too.")
        return TableWeights(
            {
                task: WeightTable.build(
                    by_task[task],
                    list(rewards[task]),
                    names,
                    where=f"table.{task}" if is_by_task(self.rows) else "table",
                )
                for task, names in categories.items()
            }
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        categories = {
            task: (*part.train.categories, *part.validation.categories)  # which probe and monitor weigh as well
            for task, part in data_by_task(trainer.datamodule).items()
        }
        self.source = self.source_for(pl_module.reward_weights, categories)
        self.means = {task: torch.full_like(t.values, torch.nan) for task, t in self.source.tables.items()}
        pl_module.weight_source = self.source

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if self.adapt is None:
            return
        for task in self.source.tables:
            totals = self._totals(task, outputs["iteration"])
            # of all ranks, or each would weigh differently
            totals = trainer.strategy.reduce(totals.to(trainer.strategy.root_device), reduce_op="sum").cpu()
            self.move(task, *totals)

    def move(self, task: str, sums: Tensor, counts: Tensor) -> None:
        """Move a task's weights by one iteration's scores, given as sums and counts, float64 (C, K) each."""
        self.means[task] = smoothed_means(self.means[task], sums, counts, self.adapt.smoothing)
        table = self.source.tables[task].values
        self.source.current[task] = adapted(self.source.current[task], table, self.means[task], self.adapt)

    def _totals(self, task: str, iteration: Iteration) -> Tensor:
        """Sums and counts of this rank's scores by row and reward, float64 (2, C, K)."""
        table = self.source.tables[task]
        rows = [n for n, t in enumerate(iteration.tasks) if t == task]
        columns = [iteration.reward_names.index(name) for name in table.rewards]
        scores = iteration.scores[rows][:, columns].double()
        at = torch.tensor([table.row_of(iteration.categories[n]) for n in rows], dtype=torch.int64)
        empty = torch.zeros_like(table.values)
        valid = (~scores.isnan()).double()
        return torch.stack([empty.index_add(0, at, scores.nan_to_num()), empty.index_add(0, at, valid)])

    # ----------------------------------------------------------------- state

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.source is None:
            return {}
        return {
            "tables": {task: _named(table) for task, table in self.source.tables.items()},
            "current": dict(self.source.current),
            "means": dict(self.means),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        for task, table in self.source.tables.items():
            if state_dict["tables"].get(task) != _named(table):
                raise ValueError(
                    f"The checkpoint was trained with another weight table for '{task}': "
                    f"{state_dict['tables'].get(task)}, now {_named(table)}. Resume with the table that the run began "
                    "with, or start a new run."
                )
        self.source.current = dict(state_dict["current"])
        self.means = dict(state_dict["means"])


def _named(table: WeightTable) -> dict[str, Row]:
    """The table as plain values."""
    rows = (dict(zip(table.rewards, row, strict=True)) for row in table.values.tolist())
    return dict(zip(table.categories, rows, strict=True))
