"""Callbacks that evaluate or read the model beside training, where it is spread over two ranks."""

from __future__ import annotations

import pytest
import torch
from tests.dist.dist_runs import LORA
from tests.planted import Brightness

from callbacks import ExportAdapter, HackingMonitor, RewardRangeFilter, UpdateProbe
from flow_rl.models import load_image_model
from flow_rl.models.adapters import (STUDENT_ADAPTER, load_frozen_adapter)

pytestmark = pytest.mark.dist
BFLOAT16 = {"precision": "bfloat16"}
MONITORED = {"monitors": {"watched": Brightness()}}


def watching() -> tuple:
    """New ones for every run: they have a state."""
    return UpdateProbe(every=1, prompts=2), HackingMonitor(every=1, prompts=4, members=2)


def test_watching_changes_nothing_and_spoils_no_checkpoint(recorded) -> None:
    """A root whose whole weights stayed after an evaluation would be stepped over, and saved in bfloat16."""
    arguments = {"strategy_settings": BFLOAT16, "module": MONITORED}
    alone = recorded("clipped", "fsdp2", 2, **arguments)
    watched = recorded("clipped", "fsdp2", 2, **arguments, extra=watching())
    assert watched["losses"] == alone["losses"]
    assert all(torch.equal(watched["weights"][name], weight) for name, weight in alone["weights"].items())
    second = next(watched["directory"].glob("*step=4.ckpt"))  # two updates an iteration
    resumed = recorded("clipped", "fsdp2", 2, **arguments, extra=watching(), resume=str(second))
    assert resumed["losses"].keys() < alone["losses"].keys()
    assert all(torch.equal(resumed["weights"][name], weight) for name, weight in alone["weights"].items())


def test_curation_in_the_run_and_an_adapter_alone(recorded, files, tmp_path) -> None:
    """Three batches are two for one rank and one for the other, which must not wait for a forward that never comes."""
    extra = (
        RewardRangeFilter(0.0, scores=str(tmp_path / "scores.safetensors"), sample_missing=True, batch_size=5),
        ExportAdapter(str(tmp_path / "adapter")),
    )
    run = recorded("nft", "fsdp2", 2, module={"lora": LORA}, extra=extra)
    model = load_image_model(files["generator"], image_size=(32, 32))
    load_frozen_adapter(model.transformer, tmp_path / "adapter", STUDENT_ADAPTER)
    # The adapter is that of the average.
    expected = {name.removeprefix("model.transformer."): weight for name, weight in run["ema"].items()}
    found = {name: p for name, p in model.transformer.named_parameters() if ".lora_" in name}
    assert found.keys() == expected.keys()
    # The file holds the adapter's scale, alpha / rank = 2, in B.
    scaled = {name: weight * 2 if ".lora_B." in name else weight for name, weight in expected.items()}
    assert all(torch.equal(found[name], weight) for name, weight in scaled.items())
    assert any(weight.any() for name, weight in expected.items() if "lora_B" in name)
