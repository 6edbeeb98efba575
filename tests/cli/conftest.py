"""Fixtures of the tests of the CLI."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import QwenImage21Pipeline
from lightning.pytorch.cli import LightningCLI

from cli import app
from demo.scorers.convolutional_quality import ConvolutionalQuality
from demo.scorers.convolutional_reader import ConvolutionalReader
from demo.scorers.quality import QualityScore
from demo.scorers.verifiers import Verifier

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_loads(monkeypatch) -> None:
    """From the project's root, with scorers that need no weights; a generator that loads fails the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(Verifier, "load", classmethod(lambda cls, _name: ConvolutionalReader(width=8)))
    monkeypatch.setattr(QualityScore, "load", classmethod(lambda cls, _name: ConvolutionalQuality(width=8)))
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
