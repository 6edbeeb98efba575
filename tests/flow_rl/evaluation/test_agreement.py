"""Agreement with human scores: closed forms, and two ranks against one."""

from __future__ import annotations

import math
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics.functional import kendall_rank_corrcoef

from flow_rl.evaluation.agreement import Agreement, identical_in_group, pairwise_accuracy, reliability

NAN = float("nan")


def compute(predictions: list[float], truths: list[float], groups: list | None = None) -> dict[str, float]:
    metric = Agreement()
    metric.update(torch.tensor(predictions), torch.tensor(truths), groups or [None] * len(truths))
    return {name: float(value) for name, value in metric.compute().items()}


def test_correlations_and_error_equal_their_closed_forms() -> None:
    predictions, truths = [1.0, 2.5, 2.0, 4.0], [1.0, 2.0, 3.0, 5.0]
    found = compute(predictions, truths)
    # ranks 1 3 2 4 against 1 2 3 4: 1 - 6 sum d^2 / (n (n^2 - 1)) with sum d^2 = 2
    assert found["srcc"] == pytest.approx(1 - 6 * 2 / (4 * 15), abs=1e-6)
    x, y = torch.tensor(predictions).double(), torch.tensor(truths).double()
    covariance = ((x - x.mean()) * (y - y.mean())).sum()
    assert found["plcc"] == pytest.approx(float(covariance / (x.std() * y.std() * 3)), abs=1e-6)
    assert found["mse"] == pytest.approx((0 + 0.25 + 1 + 1) / 4)
    assert found["count"] == 4


def test_pairwise_accuracy_counts_pairs_by_hand() -> None:
    predictions, truths = torch.tensor([1.0, 1.2, 3.0, 3.0]), torch.tensor([1.0, 1.0, 2.0, 4.0])
    with_ties, without = pairwise_accuracy(predictions, truths, tie_margin=0.5)
    # truths differ in five pairs: four are ordered alike, and (3.0, 3.0) counts half
    assert float(without) == pytest.approx(4.5 / 5)
    # of all six, (1.0, 1.2) is a tie in both, four are ordered alike, (3.0, 3.0) is a tie for the model alone
    assert float(with_ties) == pytest.approx(5 / 6)


def test_pairwise_accuracy_agrees_with_kendalls_tau_where_nothing_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    truths = torch.randperm(40, generator=generator) / 10 + 1
    predictions = truths + torch.randn(40, generator=generator)
    _, without = pairwise_accuracy(predictions, truths, tie_margin=0.5)
    assert float(without) == pytest.approx((1 + float(kendall_rank_corrcoef(predictions, truths))) / 2, abs=1e-6)


def test_reliability_curve_and_its_error_by_hand() -> None:
    predictions, truths = torch.tensor([1.2, 1.4, 4.8, 5.0]), torch.tensor([1.0, 2.0, 4.0, 4.0])
    curve = reliability(predictions, truths, bins=4)
    assert curve.counts.tolist() == [2, 0, 0, 2]
    assert curve.centres.tolist() == [1.5, 2.5, 3.5, 4.5]
    assert curve.predicted[[0, 3]].tolist() == pytest.approx([1.3, 4.9])
    assert curve.truth[[0, 3]].tolist() == pytest.approx([1.5, 4.0])
    assert curve.predicted[1].isnan()
    assert float(curve.error) == pytest.approx((2 * 0.2 + 2 * 0.9) / 4)


def test_identical_scores_are_counted_inside_groups_alone() -> None:
    predictions = torch.tensor([3.0, 3.0, 4.0, 3.0, 3.0, 3.0])
    groups = torch.tensor([7, 7, 7, 8, -1, -1])
    assert float(identical_in_group(predictions, groups)) == pytest.approx(1 / 3)
    assert identical_in_group(predictions, torch.full((6,), -1)).isnan()
    assert compute([3.0, 3.0, 4.0], [1.0, 2.0, 3.0], ["a", "a", "a"])["identical_in_group"] == pytest.approx(1 / 3)


def test_order_inside_groups_looks_at_no_other_pair() -> None:
    # Group a: 1 < 2 right, 1 < 3 a tie, 2 < 3 wrong. Group b: no truths differ. All pairs across groups are wrong.
    predictions, truths = [5.0, 5.5, 5.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0, 4.0]
    found = compute(predictions, truths, ["a", "a", "a", "b", "b"])
    assert found["pairwise_accuracy_in_group"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert math.isnan(compute(predictions, truths)["pairwise_accuracy_in_group"])


def test_unreadable_answers_lower_the_parse_rate_and_nothing_else() -> None:
    whole = compute([1.0, 2.5, 4.0], [1.0, 2.0, 5.0])
    partly = compute([1.0, NAN, 2.5, 4.0], [1.0, 5.0, 2.0, 5.0])
    assert partly.pop("parse_rate") == 0.75
    assert partly.pop("count") == 4
    assert all(partly[name] == whole[name] or math.isnan(whole[name]) for name in partly)


def test_what_is_not_defined_is_nan_and_not_a_number() -> None:
    constant = compute([3.0, 3.0, 3.0], [1.0, 2.0, 3.0])
    assert math.isnan(constant["srcc"])
    assert math.isnan(constant["plcc"])
    assert constant["pairwise_accuracy"] == 0.5
    nothing = compute([NAN, NAN], [1.0, 2.0])
    assert nothing["parse_rate"] == 0
    assert all(math.isnan(nothing[name]) for name in ("srcc", "mse", "pairwise_accuracy", "calibration_error"))
    metric = Agreement()
    assert float(metric.compute()["count"]) == 0


def test_reset_forgets() -> None:
    metric = Agreement()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), [None, None])
    metric.reset()
    metric.update(torch.tensor([4.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 4.0]), [None] * 3)
    found = metric.compute()
    assert float(found["count"]) == 3
    assert float(found["srcc"]) == pytest.approx(-1, abs=1e-4)


DATA = ([1.0, 2.0, NAN, 4.5, 3.0], [1.0, 3.0, 2.0, 5.0, 2.0], ["a", "a", "b", 5, 5])


def _rank(rank: int, store: str, output: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shared, alone = Agreement(), Agreement()
    for i in range(rank, 5, 2):
        shared.update(torch.tensor(DATA[0][i : i + 1]), torch.tensor(DATA[1][i : i + 1]), DATA[2][i : i + 1])
    if rank == 1:  # the other rank saw nothing at all
        alone.update(torch.tensor(DATA[0]), torch.tensor(DATA[1]), DATA[2])
    torch.save([shared.compute(), alone.compute()], f"{output}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_give_what_one_gives(tmp_path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank, args=(f"{directory}/store", str(tmp_path / "found")), nprocs=2)
    expected = compute(DATA[0], DATA[1], DATA[2])
    for rank in range(2):
        for found in torch.load(tmp_path / f"found-{rank}.pt", weights_only=True):
            for name, value in expected.items():
                assert float(found[name]) == pytest.approx(value, abs=1e-6, nan_ok=True), name


def test_groups_do_not_collide() -> None:
    metric = Agreement()
    names = [*range(2000), *map(str, range(2000))]
    metric.update(torch.zeros(4000), torch.zeros(4000), names)
    _, _, groups = metric.scored()
    assert len(groups.unique()) == 4000
