"""Panel, probe and validation are shared over the ranks: the results of one process, and each image scored once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests.dist.dist_shared import Counting, Witness, share_rows
from tests.processes import launch
from torch.testing import assert_close

from callbacks import HackingMonitor, UpdateProbe

pytestmark = pytest.mark.dist

#: three prompts of the panel and of the probe for two ranks, and validation batches of three and of one
UNEVEN = {"eval_batch_size": 3}


@pytest.fixture(scope="module")
def seen(recorded):
    """`seen(stage, strategy, world_size)`: what the ranks of a short run saw."""
    kept: dict = {}

    def look(stage: str, strategy: str, world_size: int) -> list[dict]:
        key = (stage, strategy, world_size)
        if key not in kept:
            policy = stage != "student"
            module = {"rewards": {"bright": Counting()}} | ({"monitors": {"watched": Counting()}} if policy else {})
            extra = (HackingMonitor(every=1, prompts=3, members=2), UpdateProbe(every=1, prompts=3)) if policy else ()
            found = recorded(
                stage, strategy, world_size, steps=1, module=module, data=UNEVEN, validate=True, extra=extra, witness=True
            )
            kept[key] = [torch.load(found["directory"] / f"seen.{r}", weights_only=False) for r in range(world_size)]
        return kept[key]

    return look


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("replicated", marks=pytest.mark.slow)])
def test_looks_probes_and_validations_are_those_of_one_process(seen, strategy: str) -> None:
    (alone,), spread = seen("clipped", "single", 1), seen("clipped", strategy, 2)
    for rank in spread:
        assert len(rank["looks"]) == len(alone["looks"]) == 2
        # The second look comes after a step, whose rounding differs: the first is the one to compare closely.
        for found, expected, tolerance in zip(rank["looks"], alone["looks"], (1e-5, 1e-3), strict=True):
            close = {"rtol": tolerance, "atol": tolerance}
            assert_close(found.proxy, expected.proxy, **close)
            assert_close(found.panel, expected.panel, **close)
            assert found.measures.keys() == expected.measures.keys()
            for name, values in expected.measures.items():
                assert values.shape == (3,)
                assert_close(found.measures[name], values, **close)
            assert found.unconditional_drift.shape == expected.unconditional_drift.shape == (3,)
        assert rank["looks"][0].unconditional_drift.tolist() == [0.0] * 3
        assert_close(rank["looks"][1].unconditional_drift, alone["looks"][1].unconditional_drift, rtol=0.02, atol=1e-6)
        for found, expected in zip(rank["probes"], alone["probes"], strict=True):
            assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert rank["validation"] == pytest.approx(alone["validation"], rel=1e-3)
        assert [len(drawn.images) for drawn in rank["drawn"]] == [3, 1]
        for found, expected in zip(rank["drawn"], alone["drawn"], strict=True):
            assert found.prompts.ids == expected.prompts.ids
            assert_close(found.images, expected.images, rtol=0, atol=0.02)
    assert len(alone["probes"]) == 1
    assert alone["validation"]


def test_every_rank_decides_by_the_same_bits(seen) -> None:
    first, second = seen("clipped", "fsdp2", 2)
    for one, other in zip(first["looks"], second["looks"], strict=True):
        assert torch.equal(one.proxy, other.proxy)
        assert torch.equal(one.panel, other.panel)
        assert torch.equal(one.unconditional_drift, other.unconditional_drift)
        assert all(torch.equal(one.measures[name], other.measures[name]) for name in one.measures)
        assert one.statistics == other.statistics
    assert all(
        torch.equal(a, b)
        for one, other in zip(first["probes"], second["probes"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert first["validation"] == second["validation"]


def test_each_image_is_scored_once_in_all(seen) -> None:
    (alone,), spread = seen("clipped", "single", 1), seen("clipped", "fsdp2", 2)
    for name, expected in alone["asked"].items():
        assert sum((rank["asked"][name] for rank in spread), Counter()) == expected
        assert all(rank["asked"][name].total() < 0.7 * expected.total() for rank in spread)


@pytest.mark.parametrize("stage", ["clipped", "student"])
def test_nothing_is_whole_beside_the_transformer(seen, stage: str) -> None:
    """At real size a gathered text encoder, or the decoder's activations beside the whole transformer, do not fit."""
    for rank in seen(stage, "fsdp2", 2):
        whole: dict[str, set] = {}
        for (part, parts), count in rank["whole"].items():
            assert count > 0
            whole.setdefault(part, set()).add(parts)
        # The blank prompt is encoded right after the others: the table of embeddings is still there.
        assert whole["encode"] <= {(), ("text_encoder",)}
        assert whole["decode"] == {()}
        # While a teacher plays on a transformer of its own, the student's is not whole either.
        assert whole["velocity"] == ({("transformer",)} if stage == "clipped" else {(), ("transformer",)})


def test_a_students_gap_is_that_of_one_process(seen) -> None:
    (alone,), spread = seen("student", "single", 1), seen("student", "fsdp2", 2)
    assert "val/t2i/gap" in alone["validation"]
    for rank in spread:
        assert rank["validation"] == pytest.approx(alone["validation"], rel=1e-3, abs=1e-6)


def test_rows_come_back_in_order_and_errors_come_to_all(tmp_path) -> None:
    record = str(tmp_path / "found")
    launch(share_rows, 2, record, 2)
    first, second = (torch.load(f"{record}.{rank}", weights_only=False) for rank in range(2))
    for total, (rows, own, values) in first["rows"].items():
        others, theirs, again = second["rows"][total]
        assert [*rows[:own], *others[:theirs]] == list(range(total))
        assert len(rows) == len(others)
        expected = torch.tensor([[10.0 * row, 10.0 * row + 1] for row in range(total)]).flatten()
        assert torch.equal(values, expected)
        assert torch.equal(again, expected)
    [(kind, message)] = second["errors"]
    assert kind == "ScoringRaised"
    assert "ConnectionError: nobody there" in message
    (kind, message), *rest = first["errors"]
    assert (kind, rest) == ("RuntimeError", [])
    assert "Rank 1" in message
    assert "nobody there" in message
    assert torch.equal(first["scores"], second["scores"])
    assert first["scores"].shape == (6, 1)
    assert not first["scores"].isnan().any()
