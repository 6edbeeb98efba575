"""Checkpoints: bit for bit on the same ranks, and from any number of ranks to any other, in shards or in one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.dist.dist_runs import LORA
from tests.dist.test_dist_invariance import STAGES, assert_close

pytestmark = pytest.mark.dist


def after_first(run: dict) -> str:
    """The checkpoint of a run after its first iteration."""
    found = [p for p in Path(run["directory"]).glob("epoch*.ckpt")]
    return str(min(found, key=lambda p: int(p.stem.rpartition("=")[2])))


def assert_same(found: dict, expected: dict) -> None:
    for part in ("weights", "ema"):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(found[part][name], expected[part][name]) for name in expected[part]), part
    assert all(map(torch.equal, found["moments"], expected["moments"]))
    assert found["losses"] == {step: expected["losses"][step] for step in found["losses"]}
    assert 0 < len(found["losses"]) < len(expected["losses"])


@pytest.mark.parametrize(
    ("stage", "strategy", "changes"),
    [
        ("nft", "fsdp2", {}),
        ("clipped", "fsdp2", {"module": {"lora": LORA}}),
        pytest.param("nft", "replicated", {}, marks=pytest.mark.slow),
        *(pytest.param(stage, "fsdp2", {}, marks=pytest.mark.slow) for stage in STAGES if stage not in ("nft", "clipped")),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(recorded, stage, strategy, changes) -> None:
    whole = recorded(stage, strategy, 2, **changes)
    assert_same(recorded(stage, strategy, 2, resume=after_first(whole), **changes), whole)


@pytest.mark.slow
def test_one_file_from_shards_and_back(recorded) -> None:
    whole = recorded("nft", "fsdp2", 2)
    in_files = recorded("nft", "fsdp2", 2, strategy_settings={"sharded_checkpoints": False})
    assert Path(after_first(whole)).is_dir()
    assert Path(after_first(in_files)).is_file()
    assert_same(recorded("nft", "fsdp2", 2, resume=after_first(in_files)), whole)


def test_saved_on_two_ranks_loaded_on_one_and_back(recorded) -> None:
    alone, spread = recorded("nft", "single", 1), recorded("nft", "fsdp2", 2)
    on_one = recorded("nft", "single", 1, resume=after_first(spread))
    back = recorded("nft", "fsdp2", 2, resume=after_first(alone))
    for found, expected in ((on_one, spread), (back, alone)):
        for part in ("weights", "ema"):
            assert_close(list(found[part].values()), list(expected[part].values()))
        for step, values in found["losses"].items():
            assert values == pytest.approx(expected["losses"][step], rel=1e-4, abs=1e-7)


def test_a_checkpoint_in_shards_holds_what_is_trained_alone(recorded) -> None:
    from strategies.checkpoints import load_shards

    whole = recorded("clipped", "fsdp2", 2, module={"lora": LORA})
    state = load_shards(Path(after_first(whole)), mesh=None)["state_dict"]
    assert state.keys() == whole["weights"].keys()
    assert all("lora_" in name for name in state)
