"""Writes the report of a run: one self-contained HTML page for people and `report.json` for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flow_rl.evaluation.curves import Curve, read_tensorboard_curves
from flow_rl.evaluation.page import render_page
from flow_rl.evaluation.records import (
    SAMPLED,
    TASKS,
    Claim,
    Comparison,
    ComparisonRow,
    Report,
    RewardAgreement,
)
from flow_rl.files import put_texts

__all__ = [
    "Claim",
    "Comparison",
    "ComparisonRow",
    "Curve",
    "Report",
    "RewardAgreement",
    "read_tensorboard_curves",
    "to_json",
    "write_report",
]


def to_json(report: Report) -> dict[str, Any]:
    """The numbers of a report as plain dictionaries.

    Keys: `models`, `bench` (task, pillar, model to `mean`, `low`, `high`, `n`), `arena` (task, model to `elo`, `low`,
    `high`), `seconds`, `settings`, `bench_parts`, `categories`, `gains` and `arena_categories` (by task, like those of
    `bench` and `arena`), `claims` (`text`, `found`, `verdict`, and as numbers `value`, `low`, `high`, and `holds`, null
    where it is undecided), `reward_validation` (dimension to metric to number), `reward_model` (dimension to category,
    or `all`, to `srcc`, `pairwise_in_group`, `n` and `on`, the base; `teacher` holds the same of the teacher),
    `monitoring` (training to `looks`, `reward_change`, `monitor_change` and `alerts`), `alerts` (training to their
    number) and `commands`. Both tasks are always there in `bench` and `arena`, empty where nothing was measured. A
    number that is not defined is null.
    """
    arena = report.arena or {}
    return {
        "models": list(report.models),
        "bench": {
            task: {
                pillar: {model: asdict(interval) for model, interval in row.items()}
                for pillar, row in report.bench.get(task, {}).items()
            }
            for task in TASKS
        },
        "arena": {task: {model: asdict(rating) for model, rating in arena.get(task, {}).items()} for task in TASKS},
        "seconds": dict(report.seconds),
        "settings": dict(report.settings),
        "bench_parts": _by_task(report.bench_parts),
        "categories": _by_task(report.categories),
        "gains": {
            task: {category: asdict(interval) for category, interval in rows.items()}
            for task, rows in report.gains.items()
        },
        "arena_categories": _by_task(report.arena_categories),
        "claims": [_claim(claim) for claim in report.claims],
        "reward_validation": {dimension: dict(found) for dimension, found in report.reward_validation.items()},
        "reward_model": {
            dimension: {category: _agreement(found) for category, found in by_category.items()}
            for dimension, by_category in report.reward_model.items()
        },
        "monitoring": {
            name: {key: value for key, value in asdict(watch).items() if key != "gap"}
            for name, watch in report.monitoring.items()
        },
        "alerts": {name: len(watch.alerts) for name, watch in report.monitoring.items()},
        "commands": list(report.commands),
    }


def _claim(claim: Claim) -> dict[str, Any]:
    interval = claim.interval
    value, low, high = (None, None, None) if interval is None else (interval.mean, interval.low, interval.high)
    return {
        "text": claim.text,
        "found": claim.found,
        "verdict": claim.verdict,
        "value": value,
        "low": low,
        "high": high,
        "holds": {"holds": True, "fails": False}.get(claim.verdict),
    }


def _agreement(found: Sequence[RewardAgreement]) -> dict[str, Any]:
    """The base's figures, and those of other models by name beside them."""
    figures = {
        each.on: {name: None if value != value else value for name, value in asdict(each).items()} for each in found
    }
    return figures.pop(SAMPLED[0], {}) | figures


def _by_task(tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Tables of intervals or ratings, by task and row and model, as plain dictionaries."""
    return {
        task: {name: {model: asdict(record) for model, record in row.items()} for name, row in rows.items()}
        for task, rows in tables.items()
    }


def write_report(report: Report, directory: str | Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.json`.

    Both are complete on disk before either takes the place of an older one, so a crash leaves the old report.

    Args:
        report: what to write.
        directory: where to; made if missing.

    Returns:
        Paths of the page and of the JSON file.

    Raises:
        ValueError: settings that JSON cannot hold, an image that is none, a path that is not a directory, or a report
            that was edited or that something else wrote.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; pass the directory that is to hold report.html and report.json.")
    try:
        numbers = json.dumps(to_json(report), indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The report's settings must be plain JSON (strings, finite numbers, lists, mappings): {error}. "
            "Turn paths, tensors and the like into strings or numbers first."
        ) from error
    page = render_page(report)
    html_path, json_path = report_paths(directory)
    put_texts({html_path: page, json_path: numbers + "\n"})
    return html_path, json_path


def report_paths(directory: str | Path) -> tuple[Path, Path]:
    """Paths of the page and of the JSON file in a directory."""
    return Path(directory) / "report.html", Path(directory) / "report.json"
