"""Votes as training data: outcomes, scores, the split, the files, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import beta

from datamodules.annotation_files import read_annotations
from datamodules.preferences import read_preferences
from flow_rl.evaluation.grids import to_png
from flow_rl.evaluation.vote_outcomes import held_out, win_score
from flow_rl.evaluation.votes_to_preferences import main

PROMPTS = 6


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def images(directory: Path, level: float, task: str = "t2i", count: int = PROMPTS) -> Path:
    rows = []
    for i in range(count):
        row = {"id": i, "member": 0, "prompt": f"prompt {i}", "category": "x", "task": task, "file": f"{i}_0.png"}
        directory.mkdir(parents=True, exist_ok=True)
        (directory / row["file"]).write_bytes(to_png(torch.full((3, 2, 2), level)))
        rows.append(row)
    write(directory / "index.jsonl", rows)
    return directory


def vote(prompt: int, first: str, second: str, credit: float, **changes) -> dict:
    row = {"prompt": prompt, "member": 0, "first": first, "second": second, "credit": credit, "category": "x"}
    return row | {"text": f"prompt {prompt}"} | changes


@pytest.fixture
def world(tmp_path: Path) -> Path:
    for name, level in (("a", 0.0), ("b", 0.5), ("c", 1.0)):
        images(tmp_path / "runs" / name, level)
    return tmp_path


@pytest.fixture
def convert(world: Path) -> Callable[..., Path]:
    def run(rows: list, *changes: str, output: str = "out/pairs.jsonl") -> Path:
        votes = write(world / "votes.jsonl", rows)
        models = [
            f"--{side}={name}={world}/runs/{name}" for side, name in (("left", "a"), ("right", "b"), ("model", "c"))
        ]
        path = world / output
        main([str(votes), *models, "--dimension=alignment", f"--output={path}", *changes])
        return path

    return run


def names(path: Path) -> list[tuple[str, str]]:
    return [(p.chosen.image.parent.name, p.rejected.image.parent.name) for p in read_preferences(path)]


def test_each_preferred_image_is_chosen_and_ties_are_counted(convert, capsys) -> None:
    path = convert([vote(0, "a", "b", 1.0), vote(1, "b", "a", 1.0), vote(2, "c", "b", 0.0), vote(3, "a", "b", 0.5)])
    assert names(path) == [("a", "b"), ("b", "a"), ("b", "c")]
    assert [p.chosen.prompt for p in read_preferences(path)] == ["prompt 0", "prompt 1", "prompt 2"]
    told = capsys.readouterr().out
    assert "Read 4 votes on 4 pairs" in told
    assert f"Wrote 3 pairs to {path}" in told
    assert "Left out: 1 pairs as ties, 0 without a majority." in told


@pytest.mark.parametrize(
    ("credits", "written"),
    [
        ([1, 1, 0], [("a", "b")]),
        ([0, 1, 0], [("b", "a")]),
        ([1, 0], []),
        ([1, 0.5], []),  # one of two is no majority
        ([1, 1, 0.5], [("a", "b")]),
        ([1, 0.5, 0.5], []),
        ([1, 0.5, 0], []),
    ],
)
def test_several_votes_on_a_pair_need_a_majority_whatever_the_sides(convert, credits, written, capsys) -> None:
    # Every second voter saw the images the other way round.
    rows = [vote(0, "a", "b", c) if i % 2 else vote(0, "b", "a", 1 - c) for i, c in enumerate(credits)]
    path = convert([*rows, vote(1, "a", "b", 1)])
    assert names(path) == [*written, ("a", "b")]
    told = capsys.readouterr().out
    contradictory = 0 in credits and 1 in credits
    settled = int(contradictory and bool(written))
    assert f"Contradictory pairs: {int(contradictory)}, of which {settled} have a majority for one image." in told
    ties = credits.count(0.5) * 2 > len(credits)
    assert f"Left out: {int(ties)} pairs as ties, {int(not ties and not written)} without a majority." in told


@pytest.mark.parametrize(("won", "count"), [(1, 1), (0, 1), (2, 3), (10, 10)])
def test_a_score_is_the_mean_of_the_posterior_under_a_uniform_prior(won: int, count: int) -> None:
    assert win_score(won, count) == pytest.approx(1 + 4 * beta(1 + won, 1 + count - won).mean())


def test_scores_of_a_prompt_share_a_group_and_count_every_vote(convert) -> None:
    rows = [
        vote(0, "a", "b", 1.0),
        vote(0, "c", "a", 0.0),
        vote(1, "a", "b", 0.5),
        vote(2, "a", "b", 1),
        vote(2, "b", "a", 1),
    ]
    found = {(a.group, a.image.parent.name): a for a in read_annotations(convert(rows, "--scores"))}
    expected = {
        ("votes/0", "a"): 4.0, ("votes/0", "b"): 7 / 3, ("votes/0", "c"): 7 / 3,
        ("votes/1", "a"): 3.0, ("votes/1", "b"): 3.0,
        ("votes/2", "a"): 3.0, ("votes/2", "b"): 3.0,
    }  # fmt: skip
    assert {key: a.score for key, a in found.items()} == pytest.approx(expected, abs=1e-6)
    assert all(a.reasoning == "" and a.dimension == "alignment" for a in found.values())


def test_edits_bring_their_source(world, convert) -> None:
    for name in ("a", "b"):
        images(world / "runs" / name, 0.5, task="edit")
    source = images(world / "sources", 0.1) / "0_0.png"
    rows = [{"id": i, "instruction": f"prompt {i}", "source": f"{i}_0.png", "category": "x"} for i in range(PROMPTS)]
    edits = write(world / "sources" / "edits.jsonl", rows)
    (pair,) = read_preferences(convert([vote(0, "a", "b", 1)], f"--edits={edits}"))
    assert pair.chosen.source.resolve() == pair.rejected.source.resolve() == source.resolve()
    scored = read_annotations(convert([vote(0, "a", "b", 1)], f"--edits={edits}", "--scores", output="scores.jsonl"))
    assert {a.source.resolve() for a in scored} == {source.resolve()}


def test_validation_holds_out_whole_prompts_the_same_in_every_file(world, convert) -> None:
    for name in ("a", "b", "c"):
        images(world / "runs" / name, 0.5, count=40)
    rows = [vote(i, *pair, 1.0) for i in range(40) for pair in (("a", "b"), ("b", "c"))]
    pairs = convert(rows, "--validation=0.3")
    scores = convert(list(reversed(rows)), "--validation=0.3", "--scores", output="scores.jsonl")
    ids = {p: {row["prompt"] for row in read(p)} for p in (pairs, scores)}
    held = {p: {row["prompt"] for row in read(p.with_suffix(".validation.jsonl"))} for p in (pairs, scores)}
    assert ids[pairs] == ids[scores]
    assert held[pairs] == held[scores]
    assert not ids[pairs] & held[pairs]
    assert len(ids[pairs] | held[pairs]) == 40
    assert 4 <= len(held[pairs]) <= 20
    assert sum(held_out(i, 0.1) for i in range(20_000)) == pytest.approx(2000, abs=6 * 42)  # binomial deviation: 42


def test_images_are_found_through_a_linked_folder(world, convert) -> None:
    (world / "deep" / "er").mkdir(parents=True)
    (world / "link").symlink_to(world / "deep" / "er")
    assert names(convert([vote(0, "a", "b", 1)], output="link/pairs.jsonl")) == [("a", "b")]


GOOD = vote(0, "a", "b", 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, vote(1, "a", "bb", 1)], "line 2: unknown model 'bb'; known are a, b, c."),
        ([GOOD, vote(99, "a", "b", 1)], "line 2: '{runs}/a/index.jsonl' has no image of prompt 99, member 0."),
        ([GOOD, vote(1, "a", "b", 1, member=1)], "has no image of prompt 1, member 1."),
        (
            [GOOD, vote(1, "a", "b", 1, text="other")],
            "line 2: the voter read 'other', but {runs}/a/index.jsonl, line 2",
        ),
        ([GOOD, vote(1, "a", "b", 2)], "line 2: 'credit' is 2"),
        ([GOOD, vote(1, "a", "b", "1")], "line 2: 'credit' must be float"),
        ([GOOD, vote(1, "a", "a", 1)], "line 2: 'a' cannot battle itself"),
        ([GOOD, {"prompt": 1, "first": "a", "second": "b", "credit": 1}], "line 2: expected an object with prompt, "),
        ([GOOD, '{"prompt": 1'], "line 2: not JSON"),
        ([GOOD | {"time": 1.5}, GOOD, GOOD | {"time": 1.5}], "line 3: a copy of {votes}, line 1."),
        (
            [vote(0, "a", "b", 0.5), vote(1, "a", "b", 1), vote(1, "a", "b", 0)],
            "no pair is left of 3 votes. Left out: 1",
        ),
        ([], "has no votes"),
    ],
)
def test_bad_votes_are_named_by_line_and_nothing_is_written(world, convert, rows, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        convert(rows)
    told = capsys.readouterr().err
    assert message.format(runs=world / "runs", votes=world / "votes.jsonl") in told
    assert str(world / "votes.jsonl") in told
    assert not (world / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "gone.png"}, "runs/b/gone.png', which {index}, line 1 names."),
        ({"file": "../a/0_0.png"}, "{index}, line 1: Prompt 0: the image '../a/0_0.png' lies outside of"),
        ({"file": "/etc/hostname"}, "lies outside of"),
        ({"prompt": "another"}, "but {index}, line 1 has the prompt 'another'"),
        ({"task": "edit"}, "the images are of task 'edit' ({index}, line 1): give their sources with --edits."),
        ({"id": 1}, "{index}, line 2: id 1, member 0 is that of {index}, line 1 already."),
    ],
)
def test_images_that_the_voter_did_not_see_are_refused(world, convert, changes, message: str, capsys) -> None:
    index = world / "runs" / "b" / "index.jsonl"
    rows = read(index)
    write(index, [rows[0] | changes, *rows[1:]])
    with pytest.raises(SystemExit):
        convert([GOOD])
    assert message.format(index=index) in capsys.readouterr().err
    assert not (world / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": 5, "instruction": "prompt 0", "source": "0_0.png"},
            "votes.jsonl, line 1: the edit file has no edit with id 0",
        ),
        ({"id": 0, "instruction": "another", "source": "0_0.png"}, "edits.jsonl, line 1 has the instruction 'another'"),
        ({"id": 0, "instruction": "prompt 0", "source": "gone.png"}, "gone.png', which"),
        ({"id": 0, "source": "0_0.png"}, "edits.jsonl, line 1: expected an object with id, instruction, source"),
    ],
)
def test_edits_of_another_file_are_refused(world, convert, row, message: str, capsys) -> None:
    for name in ("a", "b"):
        images(world / "runs" / name, 0.5, task="edit")
    edits = write(world / "runs" / "a" / "edits.jsonl", [row])
    with pytest.raises(SystemExit):
        convert([GOOD], f"--edits={edits}")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dimension=a b"], "--dimension is 'a b'"),
        (["--validation=1.5"], "--validation is 1.5"),
        (["--validation=0.001"], "leaves none for validation"),
        (["--model=a=elsewhere"], "Two models are called 'a'"),
        (["--model=d={runs}/a"], "'a' and 'd' are both the images in"),
        (["--model=d={runs}/nowhere"], "No '{runs}/nowhere/index.jsonl'"),
        (["--edits={runs}/none.jsonl"], "No file '{runs}/none.jsonl'"),
    ],
)
def test_bad_options_are_refused(world, convert, changes, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        convert([GOOD], *(change.format(runs=world / "runs") for change in changes))
    assert message.format(runs=world / "runs") in capsys.readouterr().err
    assert not (world / "out").exists()


def test_text_to_image_with_sources_is_refused(world, convert, capsys) -> None:
    edits = write(world / "edits.jsonl", [{"id": 0, "instruction": "prompt 0", "source": "votes.jsonl"}])
    with pytest.raises(SystemExit):
        convert([GOOD], f"--edits={edits}")
    assert "of task 't2i'" in capsys.readouterr().err


@pytest.mark.parametrize("existing", ["pairs.jsonl", "pairs.validation.jsonl"])
def test_no_file_is_overwritten(world, convert, existing: str, capsys) -> None:
    kept = write(world / "out" / existing, ["mine"])
    with pytest.raises(SystemExit):
        convert([vote(i, "a", "b", 1) for i in range(PROMPTS)], "--validation=0.5")
    assert f"'{kept}' exists" in capsys.readouterr().err
    assert [path.name for path in kept.parent.iterdir()] == [existing]
    assert kept.read_text() == "mine\n"


def test_scores_without_a_preference_are_refused(convert, capsys) -> None:
    with pytest.raises(SystemExit):
        convert([vote(0, "a", "b", 0.5), vote(1, "a", "b", 0.5)], "--scores")
    assert "none of 2 votes prefers an image" in capsys.readouterr().err
