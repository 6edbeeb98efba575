"""What the recipe promises, held against the judge's scores."""

from __future__ import annotations

from collections.abc import Mapping

from demo.pipeline.recipe import GUIDED_BASE
from flow_rl.evaluation import BenchTree, Claim, Interval, ScoreTable
from flow_rl.evaluation.bench import OVERALL, gain, prompt_values
from flow_rl.evaluation.statistics import gain_share, mean_of_gains

TEACHERS = {"t2i": "t2i_teacher", "edit": "edit_teacher"}
#: share of each teacher's gain that the student should keep
KEPT = 0.9
#: formats of the numbers that claims rest on
POINTS, SHARE = "+.2f", ".0%"
_WORDS = {"t2i": "text-to-image", "edit": "editing"}
#: the base as it was trained, and as its users would draw from it
BASES = {"base": "the base without guidance", GUIDED_BASE: "the guided base"}

Tables = Mapping[str, Mapping[str, ScoreTable]]


def claims(tables: Tables, trees: Mapping[str, BenchTree]) -> list[Claim]:
    """The claims that the tested models allow to check.

    Args:
        tables: task to model to scores.
        trees: of each task.
    """
    found = []
    for task, models in tables.items():
        teacher = TEACHERS[task]
        if teacher in models:
            change = gain(models["base"], models[teacher], trees[task])
            found.append(_above(f"The {_WORDS[task]} teacher is better than the base.", change, 0.0, POINTS))
    if all("student" in models for models in tables.values()):
        found += [
            _beats(tables[task], trees[task], task, base) for task in tables for base in BASES if base in tables[task]
        ]
        found += [_kept(tables[task], trees[task], task) for task in tables]
        if all("mix_rl" in models for models in tables.values()):
            values = {
                task: {m: prompt_values(tables[task][m], trees[task])[OVERALL] for m in ("mix_rl", "student")}
                for task in tables
            }
            change = mean_of_gains([found["student"] - found["mix_rl"] for found in values.values()])
            found.append(_above("The student beats Mix-RL on the mean of both tasks.", change, 0.0, POINTS))
    return found


def _beats(models: Mapping[str, ScoreTable], tree: BenchTree, task: str, base: str) -> Claim:
    text = f"The student, without guidance, is better at {_WORDS[task]} than {BASES[base]}."
    return _above(text, gain(models[base], models["student"], tree), 0.0, POINTS)


def _kept(models: Mapping[str, ScoreTable], tree: BenchTree, task: str) -> Claim:
    text = f"The student has at least {KEPT:.0%} of the {_WORDS[task]} teacher's gain."
    names = ("base", TEACHERS[task], "student")
    share = gain_share(*(prompt_values(models[name], tree)[OVERALL] for name in names))
    if share is None:
        return Claim(text=text, found="the teacher itself did not gain for sure", verdict="undecided")
    return _above(text, share, KEPT, SHARE)


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
    return Claim(text=text, found=f"{mean}{unit} (95 % interval {low} to {high})", verdict=verdict)
