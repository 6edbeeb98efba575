"""Train on the prompts whose images the rewards tell apart (arXiv 2606.27608, section 3).

Shapes: N samples, K rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from datamodules.prompts import PromptDataModule, data_by_task
from flow_rl.batches import labels
from flow_rl.curation.report import console_table
from flow_rl.curation.scores import CuratedScores
from flow_rl.curation.selection import Selection, composite_ranges, group_ranges, select_prompts
from flow_rl.planning.demands import Demanding, Demands
from flow_rl.rewards.composite import weighted_mean
from flow_rl.rl.iteration import Iteration
from flow_rl.rl.reward_weights import GroupFilter, WeightSource
from flow_rl.rl.weight_table import TableWeights
from lightning_modules.curation import provenance_of, sample_in_place, task_rewards


class ScoreRangeFilter(GroupFilter):
    """Learns from the groups whose raw composite range exceeds a threshold.

    Args:
        threshold: in points of the 1..5 scale.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    @override
    def __str__(self) -> str:
        return f"RewardRangeFilter (threshold {self.threshold:g})"

    @override
    def keep(self, iteration_scores: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        """See `GroupFilter.keep`; a group with fewer than two scored images is left out."""
        composite = weighted_mean(iteration_scores.double(), weights.double())
        distinct, ranges = group_ranges(composite, groups)
        return (ranges > self.threshold)[torch.searchsorted(distinct, groups)]


class RewardRangeFilter(Callback, Demanding):
    """Keeps the prompts, or the groups, whose raw composite range exceeds a threshold.

    Offline, with `scores`: the training prompts are chosen before the first batch, from what the base scored. Online:
    a group that comes out too flat teaches nothing. It goes through the same forwards as the others, so that ranks stay
    in step, with weight 0 in the loss. Both may be on.

    Args:
        threshold: in points of the 1..5 scale; a range must exceed it.
        scores: the file that `train.py curate` made; with several tasks, one by task. None filters nothing offline.
        online: skip flat groups while training, too.
        allow_stale: use scores that were made with another model, reward or way of rolling out.
        sample_missing: make a file that is not there before training begins, with the rollout's own group size.
        batch_size: prompts a batch of `sample_missing`.

    Raises:
        ValueError: a filter that would do nothing, or a threshold out of range.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        scores: str | dict[str, str] | None = None,
        online: bool = False,
        allow_stale: bool = False,
        sample_missing: bool = False,
        batch_size: int = 16,
    ) -> None:
        if not 0 <= threshold < 4:
            raise ValueError(f"RewardRangeFilter threshold is {threshold}; a range lies in [0, 4]: take 0 to below 4.")
        if scores is None and not online:
            raise ValueError(
                "RewardRangeFilter would filter nothing: give it scores (see train.py curate), or online true."
            )
        self.threshold, self.scores, self.online = threshold, scores, online
        self.allow_stale, self.sample_missing, self.batch_size = allow_stale, sample_missing, batch_size
        self.group_filter = ScoreRangeFilter(threshold)
        #: what was kept of each task
        self.selections: dict[str, Selection] = {}
        self._restored: dict[str, Any] = {}

    @override
    def demands(self) -> Demands:
        paths = self.scores.values() if isinstance(self.scores, dict) else filter(None, [self.scores])
        missing = (path for path in paths if not self.sample_missing and not Path(path).is_file())
        return Demands(
            missing=tuple(
                f"RewardRangeFilter: no curated scores at '{path}'. Run train.py curate with the same config first, or "
                "leave the filter out."
                for path in missing
            )
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.online:
            pl_module.group_filters.append(self.group_filter)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.group_filter in pl_module.group_filters:
            pl_module.group_filters.remove(self.group_filter)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the prompts: weights are settled, checkpoints are read, and the training data are still to be made."""
        parts = data_by_task(trainer.datamodule)
        for task, path in self._paths(parts).items():
            self._make(trainer, pl_module, parts[task], path)
            curated = self._load(trainer, pl_module, path, task).align(parts[task].train)
            self.selections[task] = self.select(curated, task, pl_module.weight_source)
            parts[task].restrict(self.selections[task].kept)
            rank_zero_info(f"Prompts kept for '{task}':\n{console_table(self.selections[task])}")
        self._check_restored()

    def select(self, curated: CuratedScores, task: str, source: WeightSource) -> Selection:
        """What the threshold keeps of a task's prompts, by the weights that the run began with.

        Raises:
            ValueError: a category that would lose all its prompts.
        """
        if isinstance(source, TableWeights):
            source = source.configured()
        weights = source.weights(curated.categories, [task] * len(curated), curated.reward_names)
        ranges = composite_ranges(curated.scores, weights)
        return select_prompts(curated.ids.tolist(), curated.categories, ranges, self.threshold)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if self.online:
            pl_module.log_dict(skipped_shares(outputs["iteration"], self.threshold), batch_size=1)

    # ----------------------------------------------------------------- state

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "scores": self.scores,
            "online": self.online,
            "kept": {task: torch.tensor(found.kept) for task, found in self.selections.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        online = state_dict["online"], state_dict["threshold"]
        if online != (self.online, self.threshold) and (online[0] or self.online):
            raise ValueError(
                f"The checkpoint had RewardRangeFilter with online {online[0]} and threshold {online[1]}; now they are "
                f"{self.online} and {self.threshold}. Resume with the same, or start a new run."
            )
        if self.selections:  # a strategy that reads checkpoints late
            self._check_restored()

    def _check_restored(self) -> None:
        for task, kept in self._restored.get("kept", {}).items():
            now = set(self.selections[task].kept) if task in self.selections else set()
            then = set(kept.tolist())
            if now != then:
                raise ValueError(
                    f"The checkpoint was trained on {len(then)} '{task}' prompts, and the filter keeps {len(now)} now: "
                    f"{len(then - now)} are gone, {len(now - then)} are new. It had threshold "
                    f"{self._restored['threshold']} and scores {self._restored['scores']}. Resume with those, or start "
                    "a new run."
                )

    # ----------------------------------------------------------------- scores

    def _paths(self, parts: Mapping[str, PromptDataModule]) -> dict[str, str]:
        if self.scores is None:
            return {}
        if isinstance(self.scores, str):
            if len(parts) > 1:
                raise ValueError(
                    f"RewardRangeFilter scores is one file, and the data have the tasks {', '.join(parts)}: give one "
                    "by task, {t2i: ..., edit: ...}."
                )
            return dict.fromkeys(parts, self.scores)
        unknown = self.scores.keys() - parts.keys()
        if unknown:
            raise ValueError(f"RewardRangeFilter scores names {sorted(unknown)}; the data have {', '.join(parts)}.")
        return self.scores

    def _make(self, trainer: Trainer, policy: LightningModule, part: PromptDataModule, path: str) -> None:
        if not self.sample_missing or trainer.strategy.broadcast(Path(path).is_file()):
            return
        if trainer.ckpt_path is not None:
            raise ValueError(
                f"No curated scores at '{path}', and a resumed run cannot make them: its model has changed."
            )
        sample_in_place(trainer, policy, part, path, batch_size=self.batch_size)
        trainer.strategy.barrier("curated")

    def _load(self, trainer: Trainer, policy: LightningModule, path: str, task: str) -> CuratedScores:
        """The task's rewards alone, once it is known that they are still what they were.

        Raises:
            ValueError: scores made with something else.
        """
        curated = CuratedScores.load(path)
        present = None
        if trainer.global_rank == 0:  # one rank reads the model's files, the others believe it
            present = provenance_of(policy, task, members=curated.scores.shape[1])
        present = trainer.strategy.broadcast(present)
        differences = curated.provenance.differences(present, same_draws=False)
        if differences and not self.allow_stale:
            raise ValueError(
                f"'{path}' was made with something else: {'; '.join(differences)}. Curate anew, or accept it with "
                "RewardRangeFilter's allow_stale true."
            )
        return curated.rewards(list(task_rewards(policy, task)))


def skipped_shares(iteration: Iteration, threshold: float) -> dict[str, float]:
    """Share of the samples whose group was too flat, over all and by category."""
    kept = ScoreRangeFilter(threshold).keep(iteration.scores, iteration.weights, iteration.groups)
    names = labels(iteration.categories, iteration.tasks)
    values = {"filter/skipped": 1 - kept.float().mean().item()}
    for name in sorted(set(names)):
        rows = [n for n, label in enumerate(names) if label == name]
        values[f"filter/skipped/{name}"] = 1 - kept[rows].float().mean().item()
    return values
