"""Does the reward model agree with the judge where RL used it: on the images of the guided base and of the teacher.

The tests of these models ask both, so this compares columns of their files.

Shapes: P prompts, M images a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from demo.pipeline.models import GUIDED_BASE, TEACHERS
from flow_rl.evaluation import RewardAgreement, ScoreTable
from flow_rl.evaluation.agreement import ALL, agreement_by_category

#: by task, dimension to the judge's scores whose mean is its truth; the training's rewards have the dimensions' names
TRUTHS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "t2i": {
        "alignment": ("judge/accuracy",),
        "aesthetic": ("judge/quality",),
        "portrait": ("judge/quality",),
    },
    "edit": {"instruction_following": ("judge/done", "judge/kept")},
}


def measured_rows(task: str) -> dict[str, str]:
    """Whose tests ask the reward model: row of the tables to what `RewardAgreement.on` calls it."""
    return {GUIDED_BASE: "base", TEACHERS[task]: "teacher"}


def reward_agreement(
    tables: Mapping[str, Mapping[str, ScoreTable]],
) -> dict[str, dict[str, list[RewardAgreement]]]:
    """Agreement by dimension and category, and over all of them as `all`; the base first, then the teacher.

    Args:
        tables: task to row to scores; a table without the reward model's scores is left out.
    """
    found: dict[str, dict[str, list[RewardAgreement]]] = {}
    for task, models in tables.items():
        for dimension, truth in TRUTHS[task].items():
            for row, on in measured_rows(task).items():
                table = models.get(row)
                if table is None or dimension not in table.scores:
                    continue
                for category, agreement in _agreements(table, dimension, truth, on).items():
                    found.setdefault(dimension, {}).setdefault(category, []).append(agreement)
    return found


def _agreements(table: ScoreTable, dimension: str, truth: tuple[str, ...], on: str) -> dict[str, RewardAgreement]:
    """By category, of the images that both have scored."""
    scores: NDArray[np.float64] = table.scores[dimension]
    truths = np.mean([table.scores[name] for name in truth], axis=0)
    both = np.isfinite(scores) & np.isfinite(truths)
    prompts = np.nonzero(both)[0].tolist()
    figures = agreement_by_category(
        torch.from_numpy(scores[both]), torch.from_numpy(truths[both]), prompts, [table.categories[p] for p in prompts]
    )
    return {
        category: RewardAgreement(
            on=on,
            srcc=figures[category]["srcc"],
            pairwise_in_group=figures[category]["pairwise_accuracy_in_group"],
            n=int(figures[category]["count"]),
        )
        for category in (ALL, *sorted(figures.keys() - {ALL}))
        if figures[category]["count"]
    }
