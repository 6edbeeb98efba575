"""No writer replaces what it did not write itself, or what was edited since; what it wrote it renews."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cli.run_folder import RECORD, claim, claim_logs, release
from demo import run, sample
from demo.annotation import annotations
from demo.annotation.annotations import render_group, write_groups
from demo.making import build_base, edit_prompts, pretrain_vae
from demo.making.edit_prompts import write_edits
from demo.pipeline.stage_runner import StageRunner
from demo.pipeline.stages import Stage
from demo.world.cache import cached_arrays
from flow_rl.errors import SettingError
from flow_rl.evaluation.battles import Battle, write_battles
from flow_rl.evaluation.records import Report
from flow_rl.evaluation.report import write_report
from flow_rl.files import MANIFEST, put_files


@pytest.fixture(autouse=True)
def _nothing_held() -> Iterator[None]:
    yield
    release()


def report(directory: Path, version: int) -> None:
    write_report(
        Report(title=str(version), summary=[], models=["base"], bench={}, settings={"version": version}), directory
    )


def battles(directory: Path, version: int) -> None:
    names = {"first": "a", "second": "b", "category": "plant"}
    write_battles([Battle(prompt=version, credit=1.0, **names)], directory / "battles.jsonl")


def edits(directory: Path, version: int) -> None:
    write_edits(directory, "validation", 1 + version)


def annotated(directory: Path, version: int) -> None:
    write_groups(iter([render_group("aesthetic", version, 0, split="train")]), directory, "train")


#: a writer of two versions, and one of its files of which the second version has another content
WRITERS: dict[str, tuple[Callable[[Path, int], None], str]] = {
    "report, page": (report, "report.html"),
    "report, numbers": (report, "report.json"),
    "battles": (battles, "battles.jsonl"),
    "edits": (edits, "validation.jsonl"),
    "annotations": (annotated, "train.jsonl"),
    "preferences": (annotated, "train_preferences.jsonl"),
    "pictures of annotations": (annotated, "images/train/aesthetic-0-1.png"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writers_renew_their_own_and_nothing_else(name: str, tmp_path: Path) -> None:
    write, file = WRITERS[name]
    path = tmp_path / file
    write(tmp_path, 1)
    first = path.read_bytes()
    write(tmp_path, 2)
    assert path.read_bytes() != first
    path.write_bytes(b"mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SettingError, match="was edited since it was written here") as error:
        write(tmp_path, 1)
    assert f"'{path}'" in str(error.value)
    for manifest in tmp_path.rglob(MANIFEST):
        manifest.unlink()
        del before[manifest]
    with pytest.raises(SettingError, match="was not written here"):
        write(tmp_path, 1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_same_content_is_nobodys_loss(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    put_files({tmp_path / "a": b"one", tmp_path / "b": b"two"})
    put_files({tmp_path / "b": b"three"})
    with pytest.raises(SettingError, match="was not written here"):
        put_files({tmp_path / "a": b"other"})


#: a command, what is in the way, and words of the message
COMMANDS: dict[str, tuple[Callable[[], None], list[str], str, str]] = {
    "demo, report": (run.main, ["--dir={}"], "report.html", "was not written here"),
    "demo, battles": (run.main, ["--dir={}"], "battles_edit.jsonl", "was not written here"),
    "annotations": (annotations.main, ["--output={}"], "test_samples.jsonl", "was not written here"),
    "edits": (edit_prompts.main, ["--output={}", "--count=0.001"], "train.jsonl", "was not written here"),
    "base": (build_base.main, ["--vae=x", "--output={}"], "config.json", "was not written by an export"),
    "autoencoder": (pretrain_vae.main, ["--output={}"], "config.json", "was not written by an export"),
    "sample": (sample.main, ["--prompt=x", "--output={}/image.png"], "image.png", "add --overwrite"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_before_they_work(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    main, arguments, file, words = COMMANDS[name]
    (tmp_path / file).write_text("mine", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["command", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text(encoding="utf-8") == "mine"


def test_demo_leaves_a_training_by_hand_alone(tmp_path: Path) -> None:
    """Its folder is that of a stage, which removes checkpoints where its inputs have changed."""
    (tmp_path / "input").write_text("x", encoding="utf-8")
    mine = tmp_path / "teacher" / "last.ckpt"
    mine.parent.mkdir()
    mine.write_text("hours", encoding="utf-8")
    stage = Stage(
        name="teacher", arguments=["-c", "pass"], inputs=[tmp_path / "input"], output=tmp_path / "export",
        checkpoints=mine.parent,
    )  # fmt: skip
    with pytest.raises(SystemExit, match=r"would replace '.*last\.ckpt', which no demo run made"):
        StageRunner(tmp_path / "run").run([stage])
    assert mine.read_text(encoding="utf-8") == "hours"


def test_arrays_are_made_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.npz"
    for _ in range(2):
        assert np.array_equal(cached_arrays(path, lambda: {"a": np.arange(3)})["a"], np.arange(3))
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


# ----------------------------------------------------------------- loggers that write elsewhere


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "events").write_text("x", encoding="utf-8")


LOGS: dict[str, tuple[Callable[[Path], None], bool, str | None]] = {
    "nothing there": (lambda p: None, False, None),
    "the same command": (lambda p: claim(p, "fit", "a"), False, None),
    "another training": (lambda p: claim(p, "fit", "b"), False, "holds the records of fit"),
    "resumed": (lambda p: claim(p, "fit", "b"), True, None),
    "an evaluation": (lambda p: claim(p, "test", "a"), True, "holds the records of test"),
    "somebody else's": (foreign, False, "holds the records of an unknown command"),
}


@pytest.mark.parametrize("name", LOGS)
def test_logs_outside_of_the_run_have_one_owner(name: str, tmp_path: Path) -> None:
    make, resumes, words = LOGS[name]
    make(tmp_path / "logs")
    release()

    def take() -> None:
        claim_logs([tmp_path / "run" / "logs", tmp_path / "logs"], tmp_path / "run", "fit", "a", resumes=resumes)

    if words is None:
        take()
        assert (tmp_path / "logs" / RECORD).is_file()
    else:
        with pytest.raises(SettingError, match=words):
            take()
    assert not (tmp_path / "run").exists()  # which the run claims itself
