"""Fixtures of the tests of the CLI."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import QwenImage21Pipeline
from lightning.pytorch.cli import LightningCLI

from cli import app
from demo.scorers import sets

ROOT = Path(__file__).parents[2]


def no_scorer_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a test, scorers are small and random: no weights are read."""
    for widths in (sets.VERIFIER_WIDTHS, sets.QUALITY_WIDTHS):
        for name in widths:
            monkeypatch.setitem(widths, name, 8)
    monkeypatch.setattr(sets, "load_weights", lambda network, _file: network.eval())


@pytest.fixture
def nothing_loads(monkeypatch) -> None:
    """From the project's root, with scorers that need no weights; a generator that loads fails the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    no_scorer_weights(monkeypatch)
    monkeypatch.setattr(QwenImage21Pipeline, "from_pretrained", lambda *_a, **_k: pytest.fail("a model loaded"))


@pytest.fixture
def arrived(monkeypatch) -> list[app.FlowCLI]:
    """Stops every subcommand once all is instantiated, and keeps what got there."""
    seen: list[app.FlowCLI] = []
    monkeypatch.setattr(app.FlowCLI, "_run_subcommand", lambda cli, _subcommand: seen.append(cli))
    return seen


@pytest.fixture
def only_fit(monkeypatch) -> None:
    """The parser of one subcommand is made in a quarter of the time of all four."""
    fit = {"fit": LightningCLI.subcommands()["fit"]}
    monkeypatch.setattr(app.FlowCLI, "subcommands", staticmethod(lambda: fit))
