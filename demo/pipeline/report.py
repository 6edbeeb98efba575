"""From the files that the demo's stages leave to the report's record."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.pipeline.agreement import reward_agreement
from demo.pipeline.claims import claims
from demo.pipeline.models import AT_ONE, BASE_ROW, GUIDED_BASE, TEACHERS
from demo.pipeline.picture import boxes
from demo.pipeline.recipe import Plan
from demo.pipeline.watched import watch_of
from flow_rl.evaluation import BenchTree, Comparison, ComparisonRow, Curve, Interval, Report, ScoreTable, bench
from flow_rl.evaluation.battles import battles_from_values, rate, rate_by_category, write_battles
from flow_rl.evaluation.bench import OVERALL, gain, image_values, prompt_values
from flow_rl.evaluation.curves import read_tensorboard_curves
from flow_rl.evaluation.statistics import bootstrap_mean
from flow_rl.models.images import from_uint8
from flow_rl.pictures import read_picture
from flow_rl.rewards.spec import RewardSpec

TREES = {"t2i": Path("demo/bench/t2i.yaml"), "edit": Path("demo/bench/edit.yaml")}
#: images whose overall scores are closer than this are a tie, in points of 0..100
TIE_BAND = 2.0
#: prompts shown of each category, by what was run: the whole recipe has more models to show for each
ROWS_A_CATEGORY = {"t2i": 6, "all": 3}
#: tag -> title of the learning curves; the first that a run has logged are shown
CURVES = {
    "reward/mean": "reward of the rollouts",
    "reward/std": "reward deviation inside a group",
    "val/alignment/mean": "alignment, fixed validation prompts",
    "val/aesthetic/mean": "aesthetic, fixed validation prompts",
    "val/quality/mean": "quality, fixed validation prompts",
    "val/instruction_following/mean": "instruction following, fixed validation edits",
    "val/success/mean": "edit done, fixed validation edits",
    "train/loss": "loss",
    "update/gradient_norm": "gradient norm",
}
_NOTES = (
    "The judge never touches training and chooses no setting. It shares no network, no training and no damage with the "
    "annotator, and it reads letters and flat colours with networks of its own. Settings were chosen on validation "
    "prompts by annotator and monitor; these are test prompts. docs/evaluation.md says what each pillar cannot see.",
    "The base learnt from pictures of which 60 % were damaged on purpose (demo/README.md): part of the gain is leaving "
    "the damage out.",
    "All models draw the same held-out prompts from the same noise. No training prompt names a combination of key "
    "attributes that a test prompt names.",
    "Battles are judged by the difference of the bench's overall scores of two images made from the same noise; "
    f"less than {TIE_BAND:g} points are a tie. They add no opinion that the bench does not have. For people's votes: "
    "python -m flow_rl.evaluation.voting.",
    "Intervals are 95 %, resampled by prompt. They say nothing of the spread between training seeds.",
    "Everything here ran on a CPU with a toy-sized model of the real classes. Nothing in this report has run on a GPU.",
)
_WHOLE_NOTES = (
    "base_guided, the teachers and mix_rl are drawn at the guidance of the training rollouts, at which the student "
    f"imitated its teachers; base, student and the rows that end in {AT_ONE} are drawn without guidance. A guided "
    "image costs twice the model evaluations.",
    "The base before it was damaged, which would be the control of what leaving the damage out is worth, is not "
    "shipped and not in the tables.",
    "Faces are compared by one embedder in the editing reward and in the judge's identity facet: of that facet alone "
    "the judge is not independent of the training.",
)
_QUICK_NOTE = (
    "This was a quick run: a dozen updates a model and 60 test prompts of two images. It shows that every stage works "
    "and that the report can be made. It cannot show that anything was learnt: gains of a run this short are noise."
)
_JOBS_NOTE = (
    "Stages ran side by side, each on its share of the cores: the whole run took less time than they add up to."
)


def build_report(plan: Plan, *, seconds: Mapping[str, float], commands: Sequence[str]) -> Report:
    """The demo's report; writes the battles beside it.

    Args:
        plan: what was run.
        seconds: wall-clock time by stage.
        commands: what was run.
    """
    trees = {task: BenchTree.load(TREES[task]) for task in plan.tasks}
    tables = {task: {r.name: _scores(plan, r.name, task) for r in plan.rows if task in r.tasks} for task in plan.tasks}
    shown = {task: {m: t for m, t in found.items() if _is_shown(m, task)} for task, found in tables.items()}
    tested = {task: bench(tables[task], trees[task]) for task in plan.tasks}
    pillars = {task: (*trees[task].pillars, OVERALL) for task in plan.tasks}
    gains = {task: _gains(tables[task], plan.models, trees[task]) for task in plan.tasks}
    arena, by_category = _arena(plan, shown, trees)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    settings = {"seed": plan.seed, "stages": plan.selection, "quick": plan.quick}
    settings |= {"upper_bound": plan.upper_bound, "stages_at_a_time": plan.jobs, "extra": list(plan.extra)}
    watched = {model: watch_of(plan.directory / model) for model in plan.trained}
    return Report(
        title="The recipe on a tiny Qwen-Image 2.1" if len(plan.tasks) > 1 else "RL on a tiny Qwen-Image 2.1",
        summary=_summary(plan, tables, trees),
        models=list(plan.models),
        bench={task: {n: row for n, row in table.items() if n in pillars[task]} for task, table in tested.items()},
        bench_parts={
            task: {n: row for n, row in table.items() if n not in pillars[task]} for task, table in tested.items()
        },
        categories={task: _categories(tables[task], trees[task]) for task in plan.tasks},
        gains=gains,
        pipeline=boxes(whole=plan.whole, upper_bound=plan.upper_bound),
        claims=claims(tables, trees),
        reward_validation=_reward_validation(plan.reward_model) if plan.whole else {},
        reward_model=reward_agreement(tables) if plan.whole else {},
        monitoring={model: watch for model, watch in watched.items() if watch is not None},
        curves=[curve for model in plan.trained for curve in _curves(plan.directory / model, model)],
        grids=[grid for task in plan.tasks for grid in _grids(plan, task, shown[task], trees[task])],
        arena=arena,
        arena_categories=by_category,
        seconds={name: round(value, 1) for name, value in seconds.items()},
        settings=settings | machine,
        commands=list(commands),
        notes=[
            *([_QUICK_NOTE] if plan.quick else []),
            *(_WHOLE_NOTES if plan.whole else ()),
            *_NOTES,
            *([_JOBS_NOTE] if plan.jobs > 1 else []),
        ],
        score_name="judge's overall score",
        score_format=".1f",
    )


def _scores(plan: Plan, model: str, task: str) -> ScoreTable:
    return ScoreTable.load(plan.test_directory(model, task) / "test_scores.jsonl")


def _is_shown(row: str, task: str) -> bool:
    """Whether images and battles show a row: models at the guidance they are used at, and only the task's teacher."""
    others = [teacher for of, teacher in TEACHERS.items() if of != task]
    return not row.endswith(AT_ONE) and row not in others


def _summary(plan: Plan, tables: Mapping[str, Mapping[str, ScoreTable]], trees: Mapping[str, BenchTree]) -> list[str]:
    last = plan.models[-1]
    judged = "a fine-tuned vision-language model" if plan.whole else "a set of verifiers"
    lines = [
        "GRPO trained the shipped base on the demo world under hybrid guidance: groups of guided images are drawn "
        f"inside the training step, {judged} scored them, and the update moved the model towards the better images of "
        "each group."
    ]
    if plan.whole:
        lines[0] += (
            " One teacher learnt text-to-image and one editing, on curated prompts with reward weights by category; "
            "the student was distilled from the guided teachers on its own trajectories. Mix-RL, one model trained on "
            "both tasks with as many updates and images, is what it has to beat."
        )
    for task, models in tables.items():
        what = "Text-to-image" if task == "t2i" else "Editing"
        gains = {name: gain(models[name], models[last], trees[task]) for name in (BASE_ROW, GUIDED_BASE)}
        found = "; ".join(
            f"{change.mean:+.1f} points over {name} (95 % interval {change.low:+.1f} to {change.high:+.1f})"
            for name, change in gains.items()
        )
        lines.append(f"{what}, judge's overall score, held-out prompts: {last} {found}.")
    return [*([_QUICK_NOTE] if plan.quick else []), *lines]


def _gains(tables: Mapping[str, ScoreTable], models: Sequence[str], tree: BenchTree) -> dict[str, Interval]:
    first, last = tables[models[0]], tables[models[-1]]
    categories = list(dict.fromkeys(first.categories))
    return {OVERALL: gain(first, last, tree)} | {c: gain(first, last, tree, category=c) for c in categories}


def _categories(tables: Mapping[str, ScoreTable], tree: BenchTree) -> dict[str, dict[str, Interval]]:
    names = dict.fromkeys(next(iter(tables.values())).categories)
    return {
        name: {m: bootstrap_mean(prompt_values(t.select(name), tree)[OVERALL]) for m, t in tables.items()}
        for name in names
    }


def _arena(plan: Plan, tables: Mapping[str, Mapping[str, ScoreTable]], trees: Mapping[str, BenchTree]) -> tuple:
    """Ratings by task, and by task and category."""
    ratings, by_category = {}, {}
    for task, found in tables.items():
        values = {model: image_values(table, trees[task])[OVERALL] for model, table in found.items()}
        some = found[BASE_ROW]
        battles = battles_from_values(values, some.ids, some.categories, tie_band=TIE_BAND)
        write_battles(battles, plan.directory / f"battles_{task}.jsonl")
        ratings[task] = rate(battles, names=list(found))
        by_category[task] = rate_by_category(battles, names=list(found))
    return ratings, by_category


def _reward_validation(export: Path) -> dict[str, dict[str, float]]:
    """What the last validation found, by dimension; a metric that is not defined is left out."""
    found = RewardSpec.read(export).validation
    return {
        dimension: {name: value for name, value in metrics.items() if value is not None}
        for dimension, metrics in found.items()
    }


def _curves(directory: Path, model: str) -> list[Curve]:
    """The curves that this training logged, by name of the model."""
    found = []
    for tag, title in CURVES.items():
        try:
            found += read_tensorboard_curves(directory, {tag: f"{model}: {title}"})
        except ValueError:  # a stage that does not log this
            continue
    return found


def _grids(plan: Plan, task: str, tables: Mapping[str, ScoreTable], tree: BenchTree) -> list[Comparison]:
    """The first prompts of each category, not the best: nothing here is picked."""
    directories = {model: plan.test_directory(model, task) / "images" for model in tables}
    index = {model: _index(directory) for model, directory in directories.items()}
    values = {model: image_values(table, tree)[OVERALL] for model, table in tables.items()}
    sources = _sources(plan.directory / "edits" / "test.jsonl") if task == "edit" else {}
    some = tables[BASE_ROW]
    grids = []
    for category in dict.fromkeys(some.categories):
        rows = []
        for row in [i for i, c in enumerate(some.categories) if c == category][: ROWS_A_CATEGORY[plan.selection]]:
            number = some.ids[row]
            rows.append(
                ComparisonRow(
                    prompt=some.prompts[row],
                    images={m: _image(directories[m] / index[m][number]["file"]) for m in tables},
                    scores={m: float(values[m][row, 0]) for m in tables},
                    source=_image(sources[number]) if number in sources else None,
                )
            )
        grids.append(Comparison(category=category if task == "t2i" else f"edits: {category}", rows=rows))
    return grids


def _index(directory: Path) -> dict[int, dict[str, Any]]:
    rows = (json.loads(line) for line in (directory / "index.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["id"]: row for row in rows if row["member"] == 0}


def _sources(path: Path) -> dict[int, Path]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: path.parent / row["source"] for row in rows}


def _image(path: Path) -> Tensor:
    return from_uint8(np.array(read_picture(path))[None])[0]
