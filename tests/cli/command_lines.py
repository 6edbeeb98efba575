"""Command lines for the tests of the CLI, and what it says of bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli import app

TEACHER = "configs/demo/t2i_teacher.yaml"
#: rewards that need no reward model
VERIFIERS = "configs/demo/verifier_rewards.yaml"


def good(model_path: str, tmp_path: Path, *more: str, subcommand: str = "fit") -> list[str]:
    """A command line without mistakes, and what is added to it."""
    place = [f"--model.model_path={model_path}", f"--run.dir={tmp_path}/runs"]
    return [subcommand, "--config", TEACHER, "--config", VERIFIERS, *place, *more]


def complaint(capsys, args: list[str]) -> str:
    """What main says of bad input, having checked the form: one message, exit status 2."""
    with pytest.raises(SystemExit) as exit_info:
        app.main(args)
    text = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "Traceback" not in text
    assert "subtypes" not in text.lower()
    assert "usage:" not in text
    lines = text.strip().splitlines()
    assert len(lines) <= 6, text
    assert sum(line.startswith("error: ") for line in lines) == 1, text
    return text
