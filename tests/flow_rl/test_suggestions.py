"""What a misspelt name may have meant."""

from __future__ import annotations

from flow_rl.suggestions import nearest, nearest_path


def test_the_nearest_name_is_given_as_it_is_written() -> None:
    assert nearest("PLATN", ["portrait", "Plant"]) == " Did you mean 'Plant'?"
    assert nearest("xyz", ["portrait", "plant"]) == ""


def test_a_long_directory_makes_no_two_files_alike(tmp_path) -> None:
    (tmp_path / "train.jsonl").touch()
    assert nearest_path(tmp_path / "trian.jsonl") == f" Did you mean '{tmp_path / 'train.jsonl'}'?"
    assert nearest_path(tmp_path / "README.md") == ""
    assert nearest_path(tmp_path / "no" / "train.jsonl") == ""
