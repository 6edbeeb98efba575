"""Under FSDP2: bfloat16 compute, recomputed activations, shards in CPU memory, validation, export."""

from __future__ import annotations

import pytest
import torch
from tests.dist.test_dist_invariance import assert_close

from callbacks import ExportModel
from flow_rl.models import load_image_model
from flow_rl.models.vision_language import load_vlm

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize("setting", ["activation_checkpointing", "cpu_offload"])
def test_saving_memory_changes_no_gradient(recorded, setting: str) -> None:
    plain = recorded("clipped", "fsdp2", 2)
    saving = recorded("clipped", "fsdp2", 2, strategy_settings={setting: True})
    assert_close(saving["gradient"], plain["gradient"])
    for step, values in plain["losses"].items():
        assert saving["losses"][step] == pytest.approx(values, rel=1e-5, abs=1e-7)


def test_bfloat16_computes_and_float32_is_kept(recorded) -> None:
    plain = recorded("flow_pretrain", "fsdp2", 2)
    coarse = recorded("flow_pretrain", "fsdp2", 2, strategy_settings={"precision": "bfloat16"})
    assert {w.dtype for w in (*coarse["weights"].values(), *coarse["moments"])} == {torch.float32}
    assert coarse["bytes"] == plain["bytes"]
    for step, values in plain["losses"].items():
        assert coarse["losses"][step] == pytest.approx(values, rel=0.03)
        assert coarse["losses"][step] != values
    steps = [coarse["weights"][name] - plain["weights"][name] for name in plain["weights"]]
    assert any((step.abs() < 1e-6).logical_and(step != 0).any() for step in steps), "weights are not rounded to bfloat16"


@pytest.mark.parametrize("stage", ["nft", "reward_finetune"])
def test_validation_and_export_are_those_of_one_process(recorded, tmp_path_factory, stage: str) -> None:
    found, exports = [], []
    for strategy, world_size in (("single", 1), ("fsdp2", 2)):
        exports.append(tmp_path_factory.mktemp("export") / strategy)
        arguments = {"extra": (ExportModel(str(exports[-1])),), "validate": True}
        found.append(recorded(stage, strategy, world_size, **arguments))
    alone, spread = found
    assert alone["validation"]
    assert spread["validation"].keys() == alone["validation"].keys()
    for name, value in alone["validation"].items():
        assert spread["validation"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    states = [weights(stage, str(path)) for path in exports]
    assert states[0].keys() == states[1].keys()
    assert_close(list(states[1].values()), list(states[0].values()))


def weights(stage: str, path: str) -> dict[str, torch.Tensor]:
    """All that plain diffusers or transformers load."""
    if stage == "nft":
        model = load_image_model(path, image_size=(32, 32))
        return model.transformer.state_dict() | {f"text/{n}": t for n, t in model.text_encoder.state_dict().items()}
    return load_vlm(path)[0].state_dict()
