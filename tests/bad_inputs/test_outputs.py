"""Outputs that belong to somebody, and disks that refuse: one message, before training where it can be known."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace
from safetensors import SafetensorError

from callbacks import ExportModel
from callbacks.image_writer import refuse_foreign_images
from callbacks.run_checkpoint import RunCheckpoint
from cli import output_checks
from cli.errors import explain_disk, refused_by_disk
from cli.output_checks import _check_disks, problems_of_outputs
from cli.run_folder import (
    LOCK,
    RECORD,
    check_fit,
    check_writable,
    claim,
    folder_of_evaluation,
    keep_former_config,
    lock,
    redirected,
    release,
    settings_digest,
)
from flow_rl.errors import CannotWrite
from flow_rl.files import MARK, put_text, refuse_foreign_folder, refuse_foreign_text, replacing, writing
from flow_rl.planning.demands import Demands
from strategies.checkpoint_files import newest_checkpoint, save_file


@pytest.fixture(autouse=True)
def _nothing_held():
    yield
    release()


def filled(path: Path, name: str = "precious", text: str = "x") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text, encoding="utf-8")
    return path


def exported(path: Path, content: str = "weights") -> Path:
    with replacing(path) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "weights").write_text(content, encoding="utf-8")
    return path


# ----------------------------------------------------------------- exports


def linked(path: Path) -> Path:
    path.symlink_to("gone")
    return path


#: what is there, and words of the message
FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "other files": (filled, "holds 'precious', and was not written by an export"),
    "other models": (lambda p: filled(p / "model").parent, "holds 'model/precious'"),
    "an empty model": (lambda p: (p.joinpath("model").mkdir(parents=True), p)[1], "holds folders"),
    "an export of an earlier version": (lambda p: filled(p, "model_index.json"), "was not written by an export"),
    "a note in an export": (lambda p: filled(exported(p), "note"), "holds 'note', which its export did not write"),
    "a model in an export": (lambda p: filled(exported(p) / "other").parent, "holds 'other/precious'"),
    "a mark that says nothing": (lambda p: filled(p, MARK, "{}"), "was not written by an export"),
    "a mark that is torn": (lambda p: filled(p, MARK, '{"fil'), "was not written by an export"),
    "a file": (lambda p: (p.write_text("x"), p)[1], "is not a folder"),
    "a link to nothing": (linked, "is not a folder"),
    "a file above": (lambda p: (p.write_text("x"), p / "export")[1], "is a file, and a folder is needed there"),
    "a name too long": (lambda p: p / ("x" * 300) / "export", "has 300 bytes"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_export_replaces_nothing_of_others(name: str, tmp_path: Path) -> None:
    make, words = FOLDERS[name]
    path = make(tmp_path / "export")
    before = sorted(tmp_path.rglob("*"))
    callback, trainer = ExportModel(str(path)), SimpleNamespace(fast_dev_run=0, is_global_zero=True)
    with pytest.raises(ValueError, match="export") as error:
        callback.setup(trainer, None, "fit")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_export_replaces_an_export_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "export"):
        for content in ("old", "new"):
            refuse_foreign_folder(exported(path, content))
            assert (path / "deep" / "weights").read_text(encoding="utf-8") == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "export"]


def test_files_that_came_meanwhile_stay(tmp_path: Path) -> None:
    path = exported(tmp_path / "export", "old")

    def export() -> None:
        with replacing(path) as partial:
            filled(partial, "weights", "new")
            filled(path, "note")

    with pytest.raises(CannotWrite, match="export-2"):
        export()
    assert (path / "note").is_file()
    assert (path / "deep" / "weights").read_text(encoding="utf-8") == "old"
    assert (tmp_path / "export-2" / "weights").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: full")]
)
def test_export_that_fails_leaves_the_old_one(tmp_path: Path, error: Exception) -> None:
    path = exported(tmp_path / "export", "old")

    def fail(partial: Path) -> None:
        filled(partial, "weights", "half")
        raise error

    trainer = SimpleNamespace(fast_dev_run=0, is_global_zero=True)
    with pytest.raises(CannotWrite, match=str(tmp_path)):
        ExportModel(str(path)).on_fit_end(trainer, SimpleNamespace(export=fail))
    assert (path / "deep" / "weights").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def setup(tmp_path: Path, *exports: Path, **changes: object) -> SimpleNamespace:
    profile = SimpleNamespace(teachers={}, rewards=changes.pop("rewards", {}), monitors={})
    given = {
        "trainer": {}, "run_directory": str(tmp_path / "run"), "checkpoints": [], "profile": profile,
        "demands": [Demands(replaces=exports)], "model": SimpleNamespace(model_path=str(exported(tmp_path / "base"))),
    }  # fmt: skip
    return SimpleNamespace(**given | changes)


APART: dict[str, tuple[Callable[[Path], SimpleNamespace], str]] = {
    "the run's own folder": (lambda p: setup(p, p / "run"), "is or holds the run's folder"),
    "above the run": (lambda p: setup(p, p), "is or holds the run's folder"),
    "the checkpoints": (
        lambda p: setup(p, p / "c", checkpoints=[SimpleNamespace(dirpath=str(p / "c"))]),
        "is or holds the run's checkpoints",
    ),
    "its own base": (lambda p: setup(p, p / "base"), "is or holds model.model_path"),
    "inside its base": (lambda p: setup(p, p / "base" / "new"), "lies inside"),
    "its reward's model": (
        lambda p: setup(p, p / "r", rewards={"a": SimpleNamespace(path=exported(p / "r"))}), "the model of reward 'a'",
    ),
    "twice the same": (lambda p: setup(p, p / "e", p / "e"), "each would replace the other"),
    "one inside the other": (lambda p: setup(p, p / "e", p / "e" / "f"), "each would replace the other"),
    "checkpoints on a file": (
        lambda p: setup(p, checkpoints=[SimpleNamespace(dirpath=str(filled(p / "x") / "precious" / "c"))]),
        "ModelCheckpoint.dirpath",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_outputs_are_apart(name: str, tmp_path: Path) -> None:
    make, words = APART[name]
    assert words in "\n".join(problems_of_outputs(make(tmp_path)))


def test_outputs_that_are_apart_are_accepted(tmp_path: Path) -> None:
    assert not list(problems_of_outputs(setup(tmp_path, tmp_path / "run" / "export", tmp_path / "other")))


# ----------------------------------------------------------------- texts and images


TEXTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a user's file": (lambda p: p.write_text("mine"), "was not written here"),
    "edited since": (lambda p: (put_text(p, "a"), p.write_text("mine")), "was edited since"),
    "a folder": (lambda p: p.mkdir(), "is no file"),
    "a link to nothing": (lambda p: p.symlink_to("gone"), "is no file"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_of_others_stays(name: str, tmp_path: Path) -> None:
    make, words = TEXTS[name]
    path = tmp_path / "weights.yaml"
    make(path)
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    for write in (lambda: put_text(path, "new"), lambda: refuse_foreign_text(path)):
        with pytest.raises(ValueError, match=r"weights\.yaml") as error:
            write()
        assert words in str(error.value)
    assert before is None or path.read_text(encoding="utf-8") == before


def test_own_text_is_replaced(tmp_path: Path) -> None:
    for text in ("a", "b", "b"):
        put_text(tmp_path / "x.json", text)
        assert (tmp_path / "x.json").read_text(encoding="utf-8") == text


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a user's picture": (lambda p: filled(p, "holiday.png"), "holiday.png"),
    "an index of something else": (lambda p: filled(p, "index.jsonl", '{"x": 1}\n'), "index.jsonl"),
    "a torn index": (lambda p: filled(p, "index.jsonl", '{"fi'), "index.jsonl"),
    "a file": (lambda p: p.write_text("x"), "is a file"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_others_stay(name: str, tmp_path: Path) -> None:
    make, words = IMAGES[name]
    make(tmp_path / "images")
    with pytest.raises(ValueError, match="ImageWriter") as error:
        refuse_foreign_images(tmp_path / "images")
    assert words in str(error.value)


# ----------------------------------------------------------------- folders of runs


def run_of(folder: Path, command: str = "fit", digest: str = "a") -> Path:
    claim(folder, command, digest)
    release()
    return folder


def with_checkpoint(folder: Path) -> Path:
    save_file({"x": 1}, run_of(folder) / "checkpoints" / "step=1.ckpt")
    return folder


FITS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "records of a test": (lambda p: run_of(p, "test"), "holds the records of test"),
    "records of a validation": (lambda p: run_of(p, "validate"), "holds the records of validate"),
    "another training": (with_checkpoint, "--ckpt_path last"),
    "somebody's config": (lambda p: filled(p, "config.yaml"), "an unknown command"),
}


@pytest.mark.parametrize("name", FITS)
def test_training_into_a_used_folder(name: str, tmp_path: Path) -> None:
    make, words = FITS[name]
    folder = make(tmp_path / "run")
    with pytest.raises(ValueError, match=r"--run\.name") as error:
        check_fit(folder, [str(folder / "checkpoints")], None)
    assert words in str(error.value)


def test_training_is_resumed_and_started_again(tmp_path: Path) -> None:
    folder = with_checkpoint(tmp_path / "run")
    own, other = folder / "checkpoints" / "step=1.ckpt", tmp_path / "other.ckpt"
    check_fit(folder, [str(own.parent)], str(own))
    with pytest.raises(ValueError, match="another training"):
        check_fit(folder, [str(own.parent)], str(other))
    check_fit(run_of(tmp_path / "failed at its start"), [str(tmp_path / "no")], None)


def test_evaluations_keep_out_of_each_others_folders(tmp_path: Path) -> None:
    free, trained = tmp_path / "free", run_of(tmp_path / "run")
    assert folder_of_evaluation(free, "test", "a") == free
    run_of(free, "test", "a")
    assert folder_of_evaluation(free, "test", "a") == free
    with pytest.raises(ValueError, match="other settings"):
        folder_of_evaluation(free, "test", "b")
    assert folder_of_evaluation(free, "validate", "a") == free / "validate"
    for number, digest in enumerate(("a", "b"), 1):
        place = trained / ("test" if number == 1 else "test-2")
        assert folder_of_evaluation(trained, "test", digest) == place
        run_of(place, "test", digest)
    assert folder_of_evaluation(trained, "test", "a") == trained / "test"
    assert json.loads((trained / RECORD).read_text(encoding="utf-8"))["command"] == "fit"


def test_what_an_evaluation_writes_is_redirected(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "run" / "test"
    logger = Namespace(class_path="x", init_args=Namespace(save_dir=str(tmp_path), name="run", version=""))
    images = Namespace(class_path="x", init_args=Namespace(directory=str(run / "images")))
    keeper = Namespace(class_path="x", init_args=Namespace(dirpath=str(run / "checkpoints")))
    config = Namespace(
        trainer=Namespace(logger=logger, callbacks=None, default_root_dir=None),
        callbacks=Namespace(images=images, checkpoint=keeper),
    )
    redirected(config, run, place)
    assert (logger.init_args.version, images.init_args.directory) == ("test", str(place / "images"))
    assert keeper.init_args.dirpath == str(run / "checkpoints")


def test_settings_and_checkpoint_tell_evaluations_apart(tmp_path: Path) -> None:
    config = {"model": {"x": 1}, "run": {"threads": 2}, "ckpt_path": "last"}
    digest = settings_digest(config, None)
    assert settings_digest(config | {"run": {"threads": 4}}, None) == digest
    assert settings_digest(config | {"model": {"x": 2}}, None) != digest
    assert settings_digest(config, str(tmp_path)) != digest


def test_settings_of_a_resumed_run_do_not_replace_those_before(tmp_path: Path) -> None:
    for text in ("a", "a", "b"):
        filled(tmp_path, "config.yaml", text)
        keep_former_config(tmp_path)
    found = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.glob("config*.yaml")}
    assert found == {"config.yaml": "b", "config_1.yaml": "a", "config_2.yaml": "b"}


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    lock(tmp_path, "--run.name")
    program = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+')\n"
        "try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-S", "-c", program, str(tmp_path / LOCK)], check=False).returncode == 3
    with pytest.raises(ValueError, match=f"Process {os.getpid()} on .* --run.name"):
        lock(tmp_path, "--run.name")
    release()
    lock(tmp_path, "--run.name")


WRITABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "on a file": (lambda p: filled(p) / "precious" / "run", "is a file"),
    "is a file": (lambda p: filled(p) / "precious", "is a file"),
    "below a broken link": (lambda p: linked(p) / "run", "broken link"),
    "a name too long": (lambda p: p / ("n" * 400), "400 bytes"),
}


@pytest.mark.parametrize("name", WRITABLE)
def test_run_directory_that_cannot_be(name: str, tmp_path: Path) -> None:
    make, words = WRITABLE[name]
    with pytest.raises(ValueError, match=r"--run\.dir") as error:
        check_writable(make(tmp_path / "runs"))
    assert words in str(error.value)


# ----------------------------------------------------------------- disks that refuse


DISK: dict[str, tuple[OSError, str]] = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "/d/x"), "'/d/x'"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/d/x"), "Read-only"),
    "failing": (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "file too large": (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
    "vanished": (FileNotFoundError(errno.ENOENT, "No such file or directory", "/d/x"), "'/d/x'"),
    "not permitted": (PermissionError(errno.EACCES, "Permission denied", "/d/x"), "Permission denied"),
    "a file in the way": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/d/x"), "Not a directory"),
    "name too long": (OSError(errno.ENAMETOOLONG, "File name too long", b"/d/x"), "too long"),
}


@pytest.mark.parametrize("name", DISK)
def test_disk_that_refuses(name: str, tmp_path: Path, monkeypatch) -> None:
    """In a checkpoint, in any other file, and where nobody expected it."""
    error, words = DISK[name]
    assert refused_by_disk(error)
    assert words in explain_disk(error)
    with pytest.raises(CannotWrite, match="some/file") as stop, writing("some/file"):
        raise error
    assert error.strerror in str(stop.value)

    path = tmp_path / "step=2.ckpt"
    save_file({"x": 1}, tmp_path / "step=1.ckpt")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(CannotWrite, match=r"step=2\.ckpt.*step=1\.ckpt") as stop:
        save_file({"x": 2}, path)
    assert error.strerror in str(stop.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step=1.ckpt"]


def test_errors_of_a_service_are_no_errors_of_the_disk() -> None:
    assert not refused_by_disk(ConnectionRefusedError(errno.ECONNREFUSED, "refused"))
    assert not refused_by_disk(TimeoutError("slow"))


def test_a_limit_on_files_names_checkpoint_and_reason(tmp_path: Path) -> None:
    """The system's own error, by way of torch's writer, which has neither path nor reason."""
    save_file({"x": torch.zeros(8)}, tmp_path / "old.ckpt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CannotWrite, match=r"new\.ckpt.*File too large.*old\.ckpt"):
            save_file({"x": torch.zeros(100_000)}, tmp_path / "new.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["old.ckpt"]


def test_room_is_counted_over_the_outputs_of_a_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(output_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
    _check_disks({str(tmp_path / "a"): 10**9, str(tmp_path / "b"): 10**9})
    with pytest.raises(ValueError, match=r"need 4\.0 GB .*'.*/a' 2\.0 GB.*3\.0 GB free"):
        _check_disks({str(tmp_path / "a"): 2 * 10**9, str(tmp_path / "b"): 2 * 10**9})


# ----------------------------------------------------------------- the newest checkpoint


def test_newest_checkpoint_is_the_newest_in_a_copy_as_well(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_file({"x": name}, tmp_path / f"{name}.ckpt")
    os.utime(tmp_path / "a.ckpt", (1, 1))
    assert newest_checkpoint([tmp_path]).name == "a.ckpt"


def test_last_checkpoint_never_stays_behind(tmp_path: Path) -> None:
    """Whatever `last.ckpt` was there, as after a resume or in a copy of a run's folder."""

    def saved(path: str, *_: object) -> None:
        save_file({"x": 1}, Path(path))

    keeper = RunCheckpoint(dirpath=tmp_path, save_last="link", every_n_train_steps=1)
    assert keeper.state_key.startswith("ModelCheckpoint{")
    trainer = SimpleNamespace(
        fast_dev_run=False,
        is_global_zero=True, save_checkpoint=saved, global_step=3, current_epoch=0, callback_metrics={}, loggers=[],
        ckpt_path=None, strategy=SimpleNamespace(
            barrier=lambda: None, reduce_boolean_decision=lambda x, **_: x, remove_checkpoint=lambda p: os.unlink(p)
        ),
    )  # fmt: skip
    keeper._fs = SimpleNamespace(exists=os.path.lexists)
    save_file({"x": 0}, tmp_path / "epoch=0-step=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=0-step=1.ckpt")
    candidates = {"step": torch.tensor(3), "epoch": torch.tensor(0)}
    keeper._save_topk_checkpoint(trainer, candidates)
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=0-step=3.ckpt"
    keeper._save_last_checkpoint(trainer, candidates)
    assert os.readlink(tmp_path / "last.ckpt") == "epoch=0-step=3.ckpt"
    assert not list(tmp_path.glob("last-*"))
