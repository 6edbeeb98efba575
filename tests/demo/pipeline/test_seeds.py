"""The table of several runs: what each found, and how often a claim holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo.pipeline.seeds import main


def write_scores(directory: Path, values: dict[int, list[float | None]]) -> None:
    """`test_scores.jsonl` of two categories that take turns; prompt to its images' scores on 1..5."""
    directory.mkdir(parents=True)
    rows = [
        {"id": i, "prompt": f"p{i}", "category": ("cats", "dogs")[i % 2], "member": m, "scores": {"judge/accuracy": v}}
        for i, images in values.items()
        for m, v in enumerate(images)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "test_scores.jsonl").write_text(text, encoding="utf-8")


def test_claims_are_counted_over_runs(tmp_path, capsys) -> None:
    for seed, verdicts in enumerate((("holds", "fails"), ("holds", "undecided"), ("undecided",))):
        claims = [{"text": f"claim {i}", "found": f"+{seed}", "verdict": v} for i, v in enumerate(verdicts)]
        (tmp_path / str(seed)).mkdir()
        content = json.dumps({"settings": {"seed": seed}, "claims": claims})
        (tmp_path / str(seed) / "report.json").write_text(content, encoding="utf-8")
    main([str(tmp_path / str(seed)) for seed in range(3)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| claim | seed 0 | seed 1 | seed 2 | holds |"
    assert lines[2] == "| claim 0 | +0: holds | +1: holds | +2: undecided | 2 of 3 |"
    assert lines[3] == "| claim 1 | +0: fails | +1: undecided |  | 0 of 3 |"


def test_a_directory_without_a_report_is_named(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "report.json" in capsys.readouterr().err


def test_gains_by_category_of_each_run_and_of_all(tmp_path, capsys) -> None:
    for name, risen in (("a", 1.0), ("b", 2.0)):  # the first run lifts cats by a point of four, the second by two
        write_scores(tmp_path / name / "test_t2i_base", {i: [1.0, 2.0] for i in range(6)})
        after = {i: [1.0 + risen, 2.0 + risen] if i % 2 == 0 else [1.0, 2.0] for i in range(6)}
        write_scores(tmp_path / name / "test_t2i_t2i_teacher", after)
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--score", "judge/accuracy"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| category | {tmp_path / 'a'} | {tmp_path / 'b'} | all runs |"
    assert lines[2].startswith("| all | +12.5 (")
    assert lines[3] == "| cats | +25.0 (25.0 to 25.0) | +50.0 (50.0 to 50.0) | +37.5 (37.5 to 37.5) |"
    assert lines[4] == "| dogs | +0.0 (0.0 to 0.0) | +0.0 (0.0 to 0.0) | +0.0 (0.0 to 0.0) |"


def test_a_category_that_a_score_does_not_apply_to_stays_empty(tmp_path, capsys) -> None:
    for model, cat in (("base", 1.0), ("t2i_teacher", 2.0)):
        write_scores(tmp_path / f"test_t2i_{model}", {i: [cat if i % 2 == 0 else None] for i in range(6)})
    main([str(tmp_path), "--score", "judge/accuracy"])
    assert capsys.readouterr().out.splitlines()[3:] == [
        "| cats | +25.0 (25.0 to 25.0) | +25.0 (25.0 to 25.0) |",
        "| dogs |  |  |",
    ]


def test_a_misspelt_score_and_other_prompts_are_named(tmp_path, capsys) -> None:
    for name, count in (("a", 4), ("b", 6)):
        for model in ("base", "t2i_teacher"):
            write_scores(tmp_path / name / f"test_t2i_{model}", {i: [1.0] for i in range(count)})
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a"), "--score", "judge/acuracy"])
    assert "Did you mean 'judge/accuracy'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a"), str(tmp_path / "b"), "--score", "judge/accuracy"])
    assert "prompts" in capsys.readouterr().err
