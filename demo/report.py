"""From the files that the demo's stages leave to the report's record.

Shapes: P prompts, M images a prompt.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.world import CATEGORIES
from evaluation import (
    Comparison,
    ComparisonRow,
    Interval,
    Report,
    bootstrap_mean,
    paired_gain,
    read_tensorboard_curves,
)
from models.images import from_uint8

MODELS = ("base", "t2i_teacher")
#: pillar of the report -> the judge's score it is made of
PILLARS = {"alignment": "judge/accuracy", "quality": "judge/quality"}
CURVES = {
    "reward/mean": "reward of the rollouts",
    "reward/std": "reward deviation inside a group",
    "val/alignment/mean": "alignment, fixed validation prompts",
    "val/quality/mean": "quality, fixed validation prompts",
    "update/gradient_norm": "gradient norm",
    "time/images_per_s": "images a second",
}
ROWS_A_CATEGORY = 6
NOTES = (
    "The judge is a set of verifiers trained on other renders, with other seeds, than the annotator that gives the "
    "reward. It never touches training; letters and flat colours are read by the same exact rules in both.",
    "The base learnt from pictures of which 60 % were damaged on purpose (demo/README.md): part of the gain is leaving "
    "the damage out. No guidance is used; docs/results.md has what guidance does to base and teacher.",
    "Both models draw the same held-out prompts from the same noise in the same way. No training prompt "
    "names a combination of key attributes that a test prompt names.",
    "Intervals are 95 %, resampled by prompt. They say nothing of the spread between training seeds.",
    "Everything here ran on a CPU with a toy-sized model of the real classes. Nothing in this report has run on a GPU.",
)


class Scores:
    """The judge's scores of one model, from `test_scores.jsonl`.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.categories = {row["id"]: row["category"] for row in self._rows}

    def matrix(self, name: str, category: str | None = None) -> np.ndarray:
        """Scores on 0..1, shape (P, M), prompts in ascending id; NaN where one could not be given."""
        by_prompt: dict[int, list[float]] = {}
        for row in self._rows:
            if category is None or row["category"] == category:
                score = row["scores"][name]
                by_prompt.setdefault(row["id"], []).append(float("nan") if score is None else (score - 1) / 4)
        return np.array([by_prompt[i] for i in sorted(by_prompt)])

    def first(self, identifier: int, name: str) -> float:
        """Score of a prompt's first image, on 0..1."""
        score = next(row["scores"][name] for row in self._rows if row["id"] == identifier)
        return float("nan") if score is None else (score - 1) / 4


def build_report(
    directory: Path, seconds: Mapping[str, float], commands: Sequence[str], settings: dict[str, Any]
) -> Report:
    """The demo's report.

    Args:
        directory: of the demo run.
        seconds: wall-clock time by stage.
        commands: what was run.
        settings: to show beside the machine's own.
    """
    scores = {name: Scores(directory / f"test_{name}" / "test_scores.jsonl") for name in MODELS}
    bench = {
        pillar: {name: bootstrap_mean(scores[name].matrix(key)) for name in MODELS} for pillar, key in PILLARS.items()
    }
    categories = {
        c: {name: bootstrap_mean(scores[name].matrix(PILLARS["alignment"], c)) for name in MODELS} for c in CATEGORIES
    }
    gains = {"overall": _gain(scores, None)} | {category: _gain(scores, category) for category in CATEGORIES}
    machine = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return Report(
        title="Reinforcement learning on a tiny Qwen-Image 2.1",
        summary=_summary(gains["overall"], bench["alignment"]),
        models=list(MODELS),
        bench={"t2i": bench, "edit": {}},
        categories=categories,
        gains=gains,
        curves=read_tensorboard_curves(directory / "t2i_teacher", CURVES),
        grids=[_comparison(directory, scores, category) for category in CATEGORIES],
        seconds={name: round(value, 1) for name, value in seconds.items()},
        settings=settings | machine,
        commands=list(commands),
        notes=list(NOTES),
        score_name="judge accuracy",
        score_format=".1%",
    )


def _summary(gain: Interval, alignment: Mapping[str, Interval]) -> list[str]:
    return [
        "GRPO trained the shipped base on prompts of the demo world: groups of images are drawn inside the "
        "training step, an annotator scores how many of the requested attributes they show, and the update moves "
        "the model towards the better images of each group.",
        f"On held-out prompts the judge finds {alignment['t2i_teacher'].mean:.1%} of the requested attributes, "
        f"against {alignment['base'].mean:.1%} for the base: {100 * gain.mean:+.1f} points (95 % interval "
        f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}).",
    ]


def _gain(scores: Mapping[str, Scores], category: str | None) -> Interval:
    before, after = (scores[name].matrix(PILLARS["alignment"], category) for name in MODELS)
    return paired_gain(before, after)


def _comparison(directory: Path, scores: Mapping[str, Scores], category: str) -> Comparison:
    """The first prompts of a category, not the best: nothing here is picked."""
    chosen = sorted(i for i, c in scores["base"].categories.items() if c == category)[:ROWS_A_CATEGORY]
    index = {name: _index(directory / f"test_{name}" / "images") for name in MODELS}
    rows = [
        ComparisonRow(
            prompt=index["base"][i]["prompt"],
            images={name: _image(directory / f"test_{name}" / "images" / index[name][i]["file"]) for name in MODELS},
            scores={name: scores[name].first(i, PILLARS["alignment"]) for name in MODELS},
        )
        for i in chosen
    ]
    return Comparison(category=category, rows=rows)


def _index(directory: Path) -> dict[int, dict[str, Any]]:
    rows = (json.loads(line) for line in (directory / "index.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["id"]: row for row in rows if row["member"] == 0}


def _image(path: Path) -> Tensor:
    with Image.open(path) as image:
        return from_uint8(np.asarray(image.convert("RGB"))[None].copy())[0]
