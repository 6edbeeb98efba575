"""`python -m demo.pipeline.seeds DIR...`: what several runs of the demo found, as Markdown tables.

Claim by claim; with `--score judge/accuracy`, how far a model is above the base by category.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.pipeline.recipe import TASKS, TRAINED, Plan
from flow_rl.evaluation import ScoreTable
from flow_rl.evaluation.bench import check_same_prompts
from flow_rl.evaluation.statistics import paired_gain
from flow_rl.suggestions import nearest


def load_report(directory: Path) -> dict[str, Any]:
    """`report.json` of a run.

    Raises:
        ValueError: a directory without one.
    """
    path = directory / "report.json"
    if not path.is_file():
        raise ValueError(f"No '{path}': give directories that `make demo` wrote, such as runs/demo.")
    return json.loads(path.read_text(encoding="utf-8"))


def claims_table(reports: Sequence[dict[str, Any]]) -> str:
    """One row a claim, one column a run, and in how many runs each claim holds.

    Args:
        reports: contents of `report.json`; a claim that a run does not make stays empty there.
    """
    seeds = [str(report["settings"]["seed"]) for report in reports]
    found = [{claim["text"]: claim for claim in report["claims"]} for report in reports]
    rows = [["claim", *(f"seed {seed}" for seed in seeds), "holds"], ["---"] * (len(seeds) + 2)]
    for text in dict.fromkeys(text for claims in found for text in claims):
        cells = [f"{claims[text]['found']}: {claims[text]['verdict']}" if text in claims else "" for claims in found]
        held = sum(text in claims and claims[text]["verdict"] == "holds" for claims in found)
        rows.append([text, *cells, f"{held} of {len(found)}"])
    return _markdown(rows)


def gains_table(directories: Sequence[Path], *, task: str, model: str, score: str) -> str:
    """Gain over the base by category: one column a run, and one of all runs together.

    The runs share their prompts. All together, a prompt brings its images of every run, and intervals are resampled by
    prompt as in every run: they hold for these runs, not for the next seed.

    Args:
        directories: runs of the demo.
        task: one of `TASKS`.
        model: one of `TRAINED`.
        score: a name in `test_scores.jsonl`, such as "judge/accuracy".

    Raises:
        ValueError: a run that has not tested the model, a score that it does not have, or runs with other prompts.
    """
    before, after = (
        {str(d): _load_scores(Plan(directory=d).test_directory(m, task), score) for d in directories}
        for m in ("base", model)
    )
    check_same_prompts(before | {f"{name}, {model}": table for name, table in after.items()})
    rows = [["category", *before, "all runs"], ["---"] * (len(before) + 2)]
    for category in (None, *sorted(set(before[str(directories[0])].categories))):
        chosen = [[t.select(category) if category else t for t in side.values()] for side in (before, after)]
        values = [[table.scores[score] for table in side] for side in chosen]
        together = [np.concatenate(side, axis=1) for side in values]
        rows.append([category or "all", *(_gain_text(*pair) for pair in (*zip(*values, strict=True), together))])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _load_scores(directory: Path, score: str) -> ScoreTable:
    table = ScoreTable.load(directory / "test_scores.jsonl")
    if score not in table.scores:
        hint = nearest(score, table.scores)
        raise ValueError(f"'{directory}' has no score '{score}'.{hint} It has {sorted(table.scores)}.")
    return table


def _gain_text(before: NDArray[np.float64], after: NDArray[np.float64]) -> str:
    """Empty where the score does not apply, as the identity of a plant."""
    if np.isnan(before).all() or np.isnan(after).all():
        return ""
    gain = paired_gain(before, after)
    return f"{gain.mean:+.1f} ({gain.low:.1f} to {gain.high:.1f})"


def main(args: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path, help="runs of the demo, with different seeds")
    parser.add_argument("--score", help="gains by this score, such as judge/accuracy, in place of the claims")
    parser.add_argument("--task", choices=TASKS, default="t2i", help="with --score: of which test")
    parser.add_argument("--model", choices=TRAINED, default="t2i_teacher", help="with --score: of which model")
    given = parser.parse_args(args)
    try:
        if given.score:
            print(gains_table(given.directories, task=given.task, model=given.model, score=given.score))
        else:
            print(claims_table([load_report(directory) for directory in given.directories]))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
