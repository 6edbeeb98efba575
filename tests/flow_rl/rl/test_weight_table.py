"""Weights by category: equal to the hand calculation, and typos named."""

from __future__ import annotations

import pytest
import torch

from flow_rl.flow.advantages import effective_weights, group_advantages
from flow_rl.rl.weight_table import TableWeights, WeightTable, is_by_task, read_rows

REWARDS = ("alignment", "aesthetic", "portrait")
ROWS = {
    "portrait": {"alignment": 0.2, "aesthetic": 0.3, "portrait": 0.5},
    "typography": {"alignment": 1.0, "aesthetic": 0.0, "portrait": 0.0},
    "default": {"alignment": 0.5, "aesthetic": 0.5, "portrait": 0.0},
}
CATEGORIES = ("portrait", "typography", "plant")


def table(rows=None, rewards=REWARDS, categories=CATEGORIES) -> WeightTable:
    return WeightTable.build(ROWS if rows is None else rows, rewards, categories)


def test_each_category_has_its_row_in_the_order_of_the_scores() -> None:
    source = TableWeights({"t2i": table()})
    found = source.weights(["plant", "portrait", "typography"], ["t2i"] * 3, ("portrait", "alignment", "aesthetic"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.2, 0.3], [0.0, 1.0, 0.0]]))


def test_tasks_have_their_own_tables_and_rewards() -> None:
    edit = WeightTable.build({"default": {"face": 0.4, "following": 0.6}}, ("face", "following"), ["portrait"])
    source = TableWeights({"t2i": table(), "edit": edit})
    names = (*REWARDS, "face", "following")
    found = source.weights(["portrait", "portrait"], ["edit", "t2i"], names)
    torch.testing.assert_close(found, torch.tensor([[0, 0, 0, 0.4, 0.6], [0.2, 0.3, 0.5, 0, 0]]))
    with pytest.raises(ValueError, match="No weight table for 'edit'"):
        TableWeights({"t2i": table()}).weights(["portrait"], ["edit"], names)


def test_masked_reward_contributes_nothing_and_the_rest_is_scaled_up() -> None:
    nan = float("nan")
    scores = torch.tensor([[2.0, 4.0, nan], [3.0, 1.0, nan], [4.0, 1.0, nan], [3.0, 2.0, nan]])
    weights = TableWeights({"t2i": table()}).weights(["portrait"] * 4, ["t2i"] * 4, REWARDS)
    found = effective_weights(weights, scores)
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.6, 0.0]]).expand(4, 3))
    advantages = group_advantages(scores, torch.zeros(4, dtype=torch.int64), weights, std_floor=0.0)
    x = scores[:, :2].double()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(advantages, (0.4 * z[:, 0] + 0.6 * z[:, 1]).float())


def test_nothing_left_weighs_nothing() -> None:
    found = effective_weights(torch.tensor([[1.0, 0.0]]), torch.tensor([[float("nan"), 3.0]]))
    assert found.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"potrait": ROWS["portrait"]}, r"row for 'potrait'.*Did you mean 'portrait'"),
        ({"portrait": {"alignmnt": 1.0}}, r"table.portrait names 'alignmnt'.*Did you mean 'alignment'"),
        ({"portrait": {"alignment": 1.0}}, "no entry for aesthetic, portrait"),
        ({"default": {"alignment": 0.6, "aesthetic": 0.6, "portrait": -0.2}}, "non-negative and sum to 1"),
        ({"default": {"alignment": 0.5, "aesthetic": 0.6, "portrait": 0.0}}, "sums to 1.1"),
        ({"default": {"alignment": float("nan"), "aesthetic": 0.6, "portrait": 0.0}}, "non-negative"),
        ({"default": {"alignment": "much", "aesthetic": 0.6, "portrait": 0.0}}, "must be a number"),
        ({"default": 1.0}, "must map rewards to weights"),
        ({"portrait": ROWS["portrait"]}, "no row for plant, typography, and no row 'default'"),
    ],
)
def test_what_cannot_be_meant_is_refused(rows, words) -> None:
    with pytest.raises(ValueError, match=words):
        table(rows)


def test_files(tmp_path) -> None:
    (tmp_path / "weights.yaml").write_text("portrait: {a: 1.0}\n")
    assert read_rows(str(tmp_path / "weights.yaml")) == {"portrait": {"a": 1.0}}
    by_task = {"t2i": str(tmp_path / "weights.yaml"), "edit": {"default": {"b": 1.0}}}
    assert read_rows(by_task) == {"t2i": {"portrait": {"a": 1.0}}, "edit": {"default": {"b": 1.0}}}
    with pytest.raises(ValueError, match=r"Did you mean 'weights.yaml'"):
        read_rows(str(tmp_path / "wieghts.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="must map categories"):
        read_rows(str(tmp_path / "list.yaml"))
    assert is_by_task({"t2i": ROWS})
    assert not is_by_task(ROWS)
