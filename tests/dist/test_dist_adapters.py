"""Adapters on a bfloat16 base: one process and two sharded ranks begin with the same one and train it alike."""

from __future__ import annotations

import pytest
import torch
from tests.dist.dist_runs import LORA
from torch import Tensor

pytestmark = pytest.mark.dist

ADAPTER = {"module": {"lora": LORA, "frozen_dtype": "bfloat16"}}
PRECISIONS = ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_seed_gives_one_adapter_on_one_process_and_in_shards(recorded, precision: str) -> None:
    alone = recorded("clipped", "single", 1, **ADAPTER)
    spread = recorded("clipped", "fsdp2", 2, strategy_settings={"precision": precision}, **ADAPTER)
    assert spread["start"].keys() == alone["start"].keys()
    assert all(".lora_" in name for name in alone["start"])
    for name, weight in alone["start"].items():
        assert spread["start"][name].dtype == weight.dtype == torch.float32
        assert torch.equal(spread["start"][name], weight), name
        assert weight.any() == ("lora_A" in name), "factors A are drawn, and factors B begin at zero"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_shards_of_two_dtypes_train_the_float32_masters(recorded, precision: str) -> None:
    """Whole or sharded, a step's gradient is the same but for bfloat16's rounding, and no master is rounded to it."""
    alone = recorded("clipped", "single", 1, **ADAPTER)
    spread = recorded("clipped", "fsdp2", 2, strategy_settings={"precision": precision}, **ADAPTER)
    gradients = [torch.cat([g.flatten() for g in run["gradient"]]) for run in (alone, spread)]
    assert gradients[0].any()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    assert float(gradients[1].norm()) == pytest.approx(float(gradients[0].norm()), rel=0.05)
    assert {tensor.dtype for tensor in (*spread["weights"].values(), *spread["moments"])} == {torch.float32}
    assert is_finer_than_bfloat16([spread["weights"][name] for name in spread["weights"] if "lora_B" in name])
    for rank in spread["ranks"]:
        for kind, total in alone["bytes"].items():
            assert rank["bytes"][kind] == pytest.approx(total / 2, rel=0.1), kind


def is_finer_than_bfloat16(tensors: list[Tensor]) -> bool:
    return any(bool((t.bfloat16() != t).any()) for t in tensors)
