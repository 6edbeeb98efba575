"""The table of several runs: what each found, and how often a claim holds."""

from __future__ import annotations

import json

import pytest

from demo.seeds import main


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
