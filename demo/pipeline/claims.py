"""What the recipe promises, held against the judge's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from demo.pipeline.models import AT_ONE, BASE_ROW, GUIDED_BASE, MIX_RL, STUDENT, TEACHERS, VERIFIER
from flow_rl.evaluation import BenchTree, Claim, Interval, ScoreTable
from flow_rl.evaluation.bench import OVERALL, gain, prompt_values
from flow_rl.evaluation.statistics import gain_share, mean_of_gains

#: share of an imitated teacher's gain over the base that the student should keep
KEPT = 0.9
#: share of the guided base's variety that the student should keep
VARIED = 0.75
#: share of a verifier-rewarded teacher's gain that the reward model should reach
REACHED = 0.6
#: formats of the numbers that claims rest on
POINTS, SHARE = "+.2f", ".0%"
_WORDS = {"t2i": "text-to-image", "edit": "editing"}
#: nodes of the edit bench: what edits are for, and what they must not cost
_SUCCESS, _UNTOUCHED = "instruction following", {"identity": "identity", "preservation": "untouched pixels"}
_VARIETY = "creativity"

Models = Mapping[str, ScoreTable]


def claims(tables: Mapping[str, Models], trees: Mapping[str, BenchTree]) -> list[Claim]:
    """The claims that the tested models allow to check.

    Teachers and Mix-RL are drawn at the guidance of their rollouts, the student at 1.

    Args:
        tables: task to row to scores.
        trees: of each task.
    """
    found: list[Claim] = []
    for task, models in tables.items():
        teacher = next((n for n in (TEACHERS[task], f"{TEACHERS[task]}{VERIFIER}") if n in models), None)
        if teacher is not None:
            found += _teacher(models, trees[task], task, teacher)
    if all(STUDENT in models for models in tables.values()):
        for task, models in tables.items():
            found += _student(models, trees[task], task)
        found += _varied(tables, trees)
        found += _against_mixed(tables, trees)
    for task, models in tables.items():
        found += _upper_bound(models, trees[task], task)
    return found


def _teacher(models: Models, tree: BenchTree, task: str, teacher: str) -> list[Claim]:
    base, after = models[GUIDED_BASE], models[teacher]
    who = f"The {_WORDS[task]} teacher"
    if task == "t2i":
        changes = {c: gain(base, after, tree, category=c) for c in dict.fromkeys(base.categories)}
        return [
            _above(f"{who} is better than the guided base.", gain(base, after, tree), 0.0, POINTS),
            _none_fell(f"{who} is significantly below the guided base in no category.", changes),
        ]
    changes = {name: gain(base, after, tree, node=node) for node, name in _UNTOUCHED.items()}
    success = gain(base, after, tree, node=_SUCCESS)
    return [
        _above(f"{who} does more of what is asked for than the guided base.", success, 0.0, POINTS),
        _none_fell(f"{who} is significantly below the guided base in neither {' nor '.join(changes)}.", changes),
    ]


def _none_fell(text: str, changes: Mapping[str, Interval]) -> Claim:
    """Holds where no change is significantly below zero; the interval of the claim is that of the lowest."""
    fallen = {name: change for name, change in changes.items() if change.high < 0}
    found = ", ".join(f"{name} {change.mean:{POINTS}}" for name, change in fallen.items())
    return Claim(
        text=text,
        found=found or "none fell",
        verdict="fails" if fallen else "holds",
        interval=min(changes.values(), key=lambda change: change.high),
    )


def _student(models: Models, tree: BenchTree, task: str) -> list[Claim]:
    found = []
    if GUIDED_BASE in models:
        change = gain(models[GUIDED_BASE], models[STUDENT], tree)
        text = f"The student, without guidance, is better at {_WORDS[task]} than the guided base."
        found.append(_above(text, change, 0.0, POINTS))
    text = f"The student has at least {KEPT:.0%} of the gain over the base of the {_WORDS[task]} teacher it imitated."
    share = gain_share(*(_values(models[name], tree) for name in (BASE_ROW, TEACHERS[task], STUDENT)))
    return [*found, _share(text, share, KEPT, "the teacher itself did not gain significantly")]


def _varied(tables: Mapping[str, Models], trees: Mapping[str, BenchTree]) -> list[Claim]:
    """Variety is a pillar of the text-to-image bench: how different the images of one prompt are."""
    models = tables.get("t2i", {})
    if GUIDED_BASE not in models or _VARIETY not in trees["t2i"].pillars:
        return []
    base, student = (prompt_values(models[name], trees["t2i"])[_VARIETY] for name in (GUIDED_BASE, STUDENT))
    text = f"The student's images of one prompt have at least {VARIED:.0%} of the guided base's variety."
    return [_share(text, gain_share(np.zeros_like(base), base, student), VARIED, "the guided base has no variety")]


def _against_mixed(tables: Mapping[str, Models], trees: Mapping[str, BenchTree]) -> list[Claim]:
    found = []
    for name, drawn in ((MIX_RL, "drawn at its guidance"), (f"{MIX_RL}{AT_ONE}", "drawn without guidance")):
        if all(name in models for models in tables.values()):
            changes = [
                _values(models[STUDENT], trees[t]) - _values(models[name], trees[t]) for t, models in tables.items()
            ]
            text = f"The student beats Mix-RL, {drawn}, on the mean of both tasks."
            found.append(_above(text, mean_of_gains(changes), 0.0, POINTS))
    return found


def _upper_bound(models: Models, tree: BenchTree, task: str) -> list[Claim]:
    """The reward model's teacher against the verifiers', where both were trained."""
    names: Sequence[str] = (GUIDED_BASE, f"{TEACHERS[task]}{VERIFIER}", TEACHERS[task])
    if not all(name in models for name in names):
        return []
    share = gain_share(*(_values(models[name], tree) for name in names))
    text = (
        f"The {_WORDS[task]} teacher has at least {REACHED:.0%} of the gain over the guided base that verifiers as "
        "rewards give."
    )
    return [_share(text, share, REACHED, "the verifiers' teacher itself did not gain significantly")]


def _values(table: ScoreTable, tree: BenchTree) -> np.ndarray:
    return prompt_values(table, tree)[OVERALL]


def _share(text: str, share: Interval | None, wanted: float, otherwise: str) -> Claim:
    if share is None:
        return Claim(text=text, found=otherwise, verdict="undecided")
    return _above(text, share, wanted, SHARE)


def _above(text: str, interval: Interval, wanted: float, show: str) -> Claim:
    """Holds where the whole interval lies above what is wanted, fails where it lies below.

    Args:
        text: of the claim.
        interval: what was found.
        wanted: in the interval's unit.
        show: format of a number, such as `POINTS`.
    """
    if interval.low > wanted:
        verdict = "holds"
    else:
        verdict = "fails" if interval.high < wanted else "undecided"
    mean, low, high = (format(value, show) for value in (interval.mean, interval.low, interval.high))
    unit = " points" if show == POINTS else ""
    return Claim(text=text, found=f"{mean}{unit} (95 % interval {low} to {high})", verdict=verdict, interval=interval)
