"""A crash at any moment of a save leaves a complete checkpoint, and it is the one that is found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from strategies import checkpoint_files
from strategies.checkpoint_files import (
    META,
    beside,
    newest_checkpoint,
    put_in_place,
    remove,
    save_file,
    sweep,
    write_meta,
)
from tests.expectations import does_not_raise

#: more than the changes to the disk that any save makes
MOMENTS = 12


class Crash(Exception):
    """In place of a power cut."""


@pytest.fixture
def crash_at(monkeypatch):
    """`crash_at(n)`: the n-th change of the disk from now on, and all after it, do not happen."""

    def arm(moment: int) -> None:
        count = [0]

        def guarded(change):
            def wrapper(*args, **kwargs):
                count[0] += 1
                if count[0] > moment:
                    raise Crash
                return change(*args, **kwargs)

            return wrapper

        for holder, name in (
            (Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (os, "replace"), (shutil, "rmtree"), (torch, "save"),
        ):  # fmt: skip
            monkeypatch.setattr(holder, name, guarded(getattr(holder, name)))

    yield arm
    monkeypatch.undo()


def write_directory(path: Path, content: int) -> None:
    partial = beside(path)
    partial.mkdir(parents=True)
    (partial / "shard").write_text(str(content))
    write_meta(partial, content)
    put_in_place(partial, path)


def read(path: Path) -> int:
    if path.is_file():
        return torch.load(path)
    content = torch.load(path / META)
    assert (path / "shard").read_text() == str(content), "shards and meta of two saves"
    return content


@pytest.mark.parametrize("before", [save_file, write_directory, None])
@pytest.mark.parametrize("after", [save_file, write_directory])
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_crash_at_any_moment_leaves_the_old_or_the_new_checkpoint(
    tmp_path, crash_at, monkeypatch, before, after, moment: int
) -> None:
    path = tmp_path / "last.ckpt"
    write = {save_file: lambda content: save_file(content, path)}.get
    if before is not None:
        (write(before) or (lambda content: write_directory(path, content)))(1)
    crash_at(moment)
    finished = False
    try:
        (write(after) or (lambda content: write_directory(path, content)))(2)
        finished = True
    except Crash:
        pass
    monkeypatch.undo()
    sweep(tmp_path)
    found = newest_checkpoint([tmp_path])
    if finished:
        assert read(found) == 2
    elif before is None:
        assert found is None or read(found) == 2
    else:
        assert read(found) in (1, 2)
    assert found is None or [p.name for p in tmp_path.iterdir()] == ["last.ckpt"], "nothing else is left"


def test_moments_cover_whole_saves(tmp_path, crash_at) -> None:
    write_directory(tmp_path / "a.ckpt", 1)
    crash_at(MOMENTS - 1)
    with does_not_raise(Crash):  # replacing a directory changes the disk most often
        write_directory(tmp_path / "a.ckpt", 2)


def test_a_directory_without_its_last_file_is_never_chosen(tmp_path) -> None:
    write_directory(tmp_path / "old.ckpt", 1)
    torn = tmp_path / "new.ckpt"
    torn.mkdir()
    (torn / "shard").write_text("2")
    assert newest_checkpoint([tmp_path]) == tmp_path / "old.ckpt"
    assert newest_checkpoint([tmp_path / "nowhere"]) is None


def test_the_newest_by_the_end_of_its_save_wins_files_and_directories_alike(tmp_path) -> None:
    for number, name in enumerate(("b.ckpt", "c.ckpt", "a.ckpt")):
        (save_file(0, tmp_path / name)) if number % 2 else write_directory(tmp_path / name, 0)
        when = tmp_path / name / META if (tmp_path / name).is_dir() else tmp_path / name
        os.utime(when, (1000 + number, 1000 + number))
    assert newest_checkpoint([tmp_path]).name == "a.ckpt"
    assert newest_checkpoint([tmp_path], newer_than=1001.5).name == "a.ckpt"
    assert newest_checkpoint([tmp_path], newer_than=1002.5) is None


def test_a_link_to_a_checkpoint_that_is_gone_is_none(tmp_path) -> None:
    write_directory(tmp_path / "step.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("step.ckpt")
    assert newest_checkpoint([tmp_path]) == tmp_path / "step.ckpt"
    remove(tmp_path / "step.ckpt")
    assert newest_checkpoint([tmp_path]) is None


def test_removing_stops_a_directory_from_counting_first(tmp_path, monkeypatch) -> None:
    write_directory(tmp_path / "a.ckpt", 1)
    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", lambda path: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        remove(tmp_path / "a.ckpt")
    assert newest_checkpoint([tmp_path]) is None
