"""`train.py curate`: score the base's rollouts of every training prompt, and report which ones a threshold keeps."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from callbacks.category_weights import CategoryWeightCalibration
from callbacks.stop_signals import StopSignals
from datamodules.prompts import PromptDataModule, data_by_task
from flow_rl.curation.proposal import propose_table, write_proposal
from flow_rl.curation.report import console_table, report_files, write_report
from flow_rl.curation.scores import CuratedScores
from flow_rl.curation.selection import composite_ranges, select_prompts
from flow_rl.curation.settings import CurationSettings
from flow_rl.files import refuse_foreign_text
from flow_rl.rl.reward_weights import WeightSource
from lightning_modules import GRPOPolicy
from lightning_modules.curation import CurationRun, task_rewards


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
    if trainer.fast_dev_run:
        raise ValueError("trainer.fast_dev_run writes nothing, and scores are all that curate makes. Leave it out.")
    for path in (*report_files(Path(settings.scores)), *filter(None, [settings.propose])):
        refuse_foreign_text(path)
    source = _weight_source(trainer, policy, datamodule)
    # What watches training has nothing to watch here.
    trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, (ProgressBar, StopSignals))]
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
            categories = {task: part.train.categories for task, part in data_by_task(datamodule).items()}
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
