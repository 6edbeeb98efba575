from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from flow_rl.evaluation.bench import BenchTree, ScoreTable, bench, gain, image_values, prompt_values

TREE = BenchTree(pillars={"alignment": {"objects": ["a", "b"], "text": ["c"]}, "quality": {"soundness": ["q"]}})
NAN = math.nan


def _table(**scores: list[list[float]]) -> ScoreTable:
    arrays = {name: np.array(values, dtype=float) for name, values in scores.items()}
    prompts = len(next(iter(arrays.values())))
    return ScoreTable(
        ids=tuple(range(prompts)),
        prompts=tuple(f"prompt {i}" for i in range(prompts)),
        categories=tuple("xy"[i % 2] for i in range(prompts)),
        scores=arrays,
    )


def _write(path: Path, rows: list[tuple[int, int, dict[str, float | None]]]) -> Path:
    lines = [{"id": i, "prompt": f"p{i}", "category": "x", "member": m, "scores": scores} for i, m, scores in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_means_go_from_the_bottom_up():
    # By hand: objects (0 + 100) / 2 = 50, alignment (50 + 100) / 2 = 75, overall (75 + 25) / 2 = 50; a plain mean of
    # the four facets would be 56.25.
    values = image_values(_table(a=[[0.0]], b=[[100.0]], c=[[100.0]], q=[[25.0]]), TREE)
    assert values["alignment/objects"] == pytest.approx(50.0)
    assert values["alignment"] == pytest.approx(75.0)
    assert values["overall"] == pytest.approx(50.0)


def test_what_does_not_apply_is_left_out_at_every_level():
    values = image_values(_table(a=[[NAN]], b=[[40.0]], c=[[NAN]], q=[[NAN]]), TREE)
    assert values["alignment"] == pytest.approx(40.0)
    assert np.isnan(values["alignment/text"]).all()
    assert np.isnan(values["quality"]).all()
    assert values["overall"] == pytest.approx(40.0)


def test_a_prompt_is_the_mean_of_its_images_that_have_a_value():
    values = prompt_values(_table(a=[[0, 100]], b=[[0, 100]], c=[[0, NAN]], q=[[10, 30]]), TREE)
    # images: alignment 0 and 100 (no text asked of the second), quality 10 and 30
    assert values["alignment"] == pytest.approx([50.0])
    assert values["overall"] == pytest.approx([(5.0 + 65.0) / 2])


def test_table_has_every_node_and_counts_prompts():
    rng = np.random.default_rng(0)
    scores = {name: rng.uniform(0, 100, (30, 2)) for name in "abcq"}
    scores["c"][10:] = NAN
    table = _table(**scores)
    found = bench({"base": table, "student": table}, TREE)
    assert list(found)[:3] == ["alignment", "quality", "overall"]
    assert set(found) == {"alignment", "quality", "overall", "alignment/objects", "alignment/text",
                          "quality/soundness", *"abcq"}  # fmt: skip
    assert found["c"]["base"].n == 10
    assert found["alignment"]["base"].n == 30
    assert found["q"]["base"].mean == pytest.approx(scores["q"].mean())
    assert found["overall"]["base"] == found["overall"]["student"]


def test_a_node_that_never_applies_is_left_out_of_the_table():
    nothing = np.full((5, 1), NAN)
    found = bench({"base": _table(a=np.ones((5, 1)), b=nothing, c=nothing, q=np.ones((5, 1)))}, TREE)
    assert "alignment/text" not in found
    assert "b" not in found


def test_gain_is_paired_and_can_be_had_by_category():
    rng = np.random.default_rng(1)
    hard = rng.uniform(0, 60, (40, 1))
    before = _table(**dict.fromkeys("abcq", hard))
    after = _table(**{name: hard + 10 + np.arange(40)[:, None] % 2 * 20 for name in "abcq"})
    assert gain(before, after, TREE, category="x").mean == pytest.approx(10.0)
    assert gain(before, after, TREE, category="y").mean == pytest.approx(30.0)
    overall = gain(before, after, TREE)
    assert overall.mean == pytest.approx(20.0)
    # How hard the prompts are (a spread of 17 points) is not in the interval of the difference.
    assert overall.high - overall.low < 8


def test_scores_are_read_by_prompt_and_member(tmp_path):
    rows = [(7, 1, {"a": 5.0}), (3, 0, {"a": 2.0}), (7, 0, {"a": 1.0}), (3, 1, {"a": None})]
    table = ScoreTable.load(_write(tmp_path / "s.jsonl", rows))
    assert table.ids == (3, 7)
    np.testing.assert_allclose(table.scores["a"], [[25.0, NAN], [0.0, 100.0]])


def test_bad_scores_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"train\.py test"):
        ScoreTable.load(tmp_path / "none.jsonl")
    uneven = _write(tmp_path / "uneven.jsonl", [(1, 0, {"a": 1.0}), (1, 1, {"a": 1.0}), (2, 0, {"a": 1.0})])
    with pytest.raises(ValueError, match=r"\[1, 2\] images"):
        ScoreTable.load(uneven)
    cut = tmp_path / "cut.jsonl"
    cut.write_text('{"id": 1, "scor', encoding="utf-8")
    with pytest.raises(ValueError, match="test the model again"):
        ScoreTable.load(cut)


def test_a_score_that_is_not_there_is_named_with_the_nearest():
    tree = BenchTree(pillars={"quality": {"all": ["judge/qualty"]}})
    with pytest.raises(ValueError, match="Did you mean 'judge/quality'"):
        image_values(_table(**{"judge/quality": [[1.0]]}), tree)


def test_models_must_share_their_prompts():
    with pytest.raises(ValueError, match="'base' and 'student' were not tested on the same prompts"):
        bench({"base": _table(q=[[1.0]] * 3), "student": _table(q=[[1.0]] * 4)}, TREE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alignment: [a]", "must map pillars"),
        ("alignment: {objects: a}", "must map pillars"),
        ("alignment: {objects: []}", "must map pillars"),
        ("a: {b: [x]}\nc: {d: [x]}", r"\['x'\] stand in several places"),
        ("overall: {b: [x]}", "none called 'overall'"),
        ("a: [", r"tree.yaml:\d: not valid YAML"),
    ],
)
def test_bad_trees_are_named(tmp_path, text, message):
    path = tmp_path / "tree.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        BenchTree.load(path)
