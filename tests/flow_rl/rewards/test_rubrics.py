"""Rubrics are data: what is shipped, what changes a hash, what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from flow_rl.rewards.rubrics import RUBRIC_DIRECTORY, Rubric, load_rubrics
from tests.toy_vlm import BRIGHTNESS_RUBRIC, rubric, write_rubric

SHIPPED = {
    "alignment": "t2i",
    "aesthetic": "t2i",
    "portrait": "t2i",
    "instruction_following": "edit",
    "visual_consistency": "edit",
}


@pytest.mark.parametrize(("name", "task"), SHIPPED.items())
def test_shipped_rubric_defines_every_score(name: str, task: str) -> None:
    loaded = Rubric.load(name)
    assert (loaded.name, loaded.task) == (name, task)
    lines = loaded.text.splitlines()
    assert all(any(line.startswith(f"{digit}: ") for line in lines) for digit in range(1, 6))
    assert '"Score: N"' in loaded.reasoning_hint


def test_every_shipped_file_is_known() -> None:
    assert {path.stem for path in RUBRIC_DIRECTORY.glob("*.yaml")} == SHIPPED.keys()


def test_alignment_has_the_hierarchys_cap() -> None:
    loaded = Rubric.load("alignment")
    assert (loaded.cap_phrase, loaded.cap_score) == ("Top criterion: failed", 2)


def test_hash_depends_on_every_field_and_on_nothing_else(tmp_path) -> None:
    plain = rubric()
    changes = [
        {"name": "other"}, {"version": 2}, {"task": "edit"}, {"text": "How dark?"}, {"reasoning_hint": "Two words."},
        {"cap_phrase": "one word", "cap_score": 2},
    ]  # fmt: skip
    hashes = {plain.hash, *(rubric(**change).hash for change in changes)}
    assert len(hashes) == 1 + len(changes)
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)
    # neither the layout of the file nor a last newline matters
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(BRIGHTNESS_RUBRIC | {"text": "How bright is it?\n"}), encoding="utf-8")
    assert Rubric.load(path).hash == Rubric.load(write_rubric(tmp_path, BRIGHTNESS_RUBRIC)).hash == plain.hash
    assert rubric(cap_phrase="One word", cap_score=2).hash == rubric(cap_phrase="One word", cap_score=2.0).hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "video"}, "task must be one of t2i, edit, received 'video'"),
        ({"text": "  "}, "the text is blank"),
        ({"version": "1"}, "'version' has the wrong type"),
        ({"cap_phrase": "One word"}, "cap_phrase and cap_score go together"),
        ({"cap_phrase": "never said", "cap_score": 2}, "is nowhere in its text"),
        ({"cap_phrase": "One word", "cap_score": 7}, "must lie on the scale 1..5"),
        ({"name": "a/b"}, "letters, digits and underscores"),
        ({"reasoning_hnt": "x"}, "Did you mean 'reasoning_hint'"),
    ],
)
def test_bad_rubric_is_refused(tmp_path, changes: dict, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(BRIGHTNESS_RUBRIC | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        Rubric.load(path)
    assert str(path) in str(caught.value)


def test_missing_rubric_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No rubric 'esthetic'\. Did you mean 'aesthetic'"):
        Rubric.load("esthetic")


def test_rubric_under_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="write portrait: portrait"):
        load_rubrics({"face": "portrait"})
