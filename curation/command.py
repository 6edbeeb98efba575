"""`train.py curate`: score the base's rollouts of every training prompt, and report which ones a threshold keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning_modules.hooks import WeightSource

from callbacks.category_weights import CategoryWeightCalibration
from curation.proposal import propose_table, write_proposal
from curation.report import console_table, write_report
from curation.sampling import CurationRun, task_rewards
from curation.scores import CuratedScores
from curation.selection import composite_ranges, select_prompts
from datamodules.prompts import PromptDataModule
from lightning_modules import GRPOPolicy


@dataclass(frozen=True, kw_only=True)
class CurationSettings:
    """What `curate` does."""

    scores: str
    """The file of scores. What is in it already is not sampled again, so a killed run goes on, and another threshold
    costs nothing."""
    threshold: float = 0.5
    """A prompt stays where the range of the composite over its images exceeds this, in points of the 1..5 scale."""
    members: int | None = None
    """Images a prompt; null for the rollout's own group size."""
    batch_size: int = 16
    """Prompts a batch: what a kill can lose, and what ranks share."""
    propose: str | None = None
    """Also suggest a table of weights by category, with reasons, in this YAML file."""

    def __post_init__(self) -> None:
        if self.members is not None and self.members < 2:
            raise ValueError(f"curation.members is {self.members}; a range needs at least 2 images a prompt.")
        if self.batch_size < 1:
            raise ValueError(f"curation.batch_size is {self.batch_size}; it must be at least 1.")
        if Path(self.scores).is_dir():
            raise ValueError(f"curation.scores is '{self.scores}', a directory; it must be a file.")


def curate(
    trainer: Trainer, policy: LightningModule, datamodule: LightningDataModule | None, settings: CurationSettings
) -> None:
    """Make the scores that are missing, then report.

    Raises:
        ValueError: a module or data that cannot be curated, scores made with something else, or a category that would
            lose all its prompts.
    """
    if not isinstance(policy, GRPOPolicy) or not isinstance(datamodule, PromptDataModule):
        raise ValueError(
            "curate needs a GRPOPolicy and the prompts of one task (PromptDataModule or EditPairDataModule); received "
            f"{type(policy).__name__} and {type(datamodule).__name__}. Curate the tasks of a mixed run one by one."
        )
    source = _weight_source(trainer, policy, datamodule)
    # nothing but the progress bar: what watches training has nothing to watch here
    trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, ProgressBar)]
    trainer.loggers = []
    run = CurationRun(policy, datamodule, settings.scores, members=settings.members, batch_size=settings.batch_size)
    if not run.is_complete():
        trainer.predict(run, return_predictions=False)
    if trainer.is_global_zero:
        curated = CuratedScores.load(settings.scores).rewards(list(task_rewards(policy, datamodule.task)))
        _report(curated.align(datamodule.train), source, datamodule.task, settings)


def _weight_source(trainer: Trainer, policy: GRPOPolicy, datamodule: PromptDataModule) -> WeightSource:
    """The weights that training would begin with: those of a table, if the config has one."""
    for callback in trainer.callbacks:
        if isinstance(callback, CategoryWeightCalibration):
            categories = {task: part.train.categories for task, part in datamodule.by_task().items()}
            return callback.source_for(policy.reward_weights, categories)
    return policy.weight_source


def _report(curated: CuratedScores, source: WeightSource, task: str, settings: CurationSettings) -> None:
    weights = source.weights(curated.categories, [task] * len(curated), curated.reward_names)
    ranges = composite_ranges(curated.scores, weights)
    ids = curated.ids.tolist()
    selection = select_prompts(ids, curated.categories, ranges, settings.threshold, whole=False)
    files = write_report(Path(settings.scores), curated, selection)
    print(console_table(selection))
    print(f"Written: {', '.join(map(str, files))}")
    # the report is there for whoever has to choose another threshold
    select_prompts(ids, curated.categories, ranges, settings.threshold)
    if settings.propose is not None:
        kept = set(selection.kept)
        proposal = propose_table(curated.rows([row for row, i in enumerate(ids) if i in kept]))
        write_proposal(settings.propose, proposal)
        print(f"Suggested weights: {settings.propose}")
