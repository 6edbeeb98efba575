"""Every stage takes two steps on the pretended GPU: no mixture of devices, and the waits that the table says."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from lightning import LightningModule

from flow_rl.models.tiny.qwen_image_21 import build_pipeline, build_transformer
from flow_rl.rewards.contract import in_range
from tests.pretended import wait_table
from tests.pretended.cases import TEXTS, Cases, names
from tests.pretended.device import pretended_cuda
from tests.pretended.waits import WaitRecorder
from tests.toy_vlm import toy_files

#: cases that add little to others and take seconds
COSTLY = ("lora_bf16_checkpointing_edits", "bf16_mixed_precision", "curation_of_edits", "guidance_in_both")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model of two blocks: every operation goes through Python here, so fewer are quicker."""
    path = tmp_path_factory.mktemp("base") / "two_blocks"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = build_pipeline(TEXTS * 4)
        pipeline.register_modules(transformer=build_transformer(num_layers=2))
        for weight in (pipeline.transformer.proj_out.weight, pipeline.transformer.modulation[1].weight):
            torch.nn.init.normal_(weight, std=0.1)  # a fresh model's last layer is zero
    pipeline.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def _toys() -> None:
    """Made before any case: whichever made them first would count their waits as its own."""
    toy_files()


@pytest.fixture
def cases(policy, data, edits, base, tmp_path) -> Cases:
    return Cases(policy=policy, data=data, edits=edits, base=base, directory=tmp_path)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in COSTLY else n for n in names()])
def test_stage_runs_on_one_device_and_waits_no_more_than_the_table_says(cases, name) -> None:
    recorder = WaitRecorder()

    def start(module: LightningModule) -> LightningModule:
        if module.clock is not None:
            recorder.phase = lambda: module.clock.current
        return module

    with pretended_cuda() as state:
        state.on_wait = recorder
        getattr(cases, name)(start)
    assert state.refused == []
    rows = wait_table.read()
    if os.environ.get(wait_table.WRITE):
        wait_table.write(rows | {name: wait_table.row_of(recorder.counts)})
        return
    told = wait_table.differences(recorder.counts, rows.get(name, {}))
    assert not told, "\n".join([*told, f"If that is meant, write the table anew: {wait_table.COMMAND}"])


def test_table_has_no_rows_of_cases_that_are_gone() -> None:
    rows = wait_table.read()
    if os.environ.get(wait_table.WRITE):
        wait_table.write({name: row for name, row in rows.items() if name in names()})
    assert set(wait_table.read()) == set(names())


def test_waits_that_are_new_are_told_with_their_lines() -> None:
    recorder = WaitRecorder(lambda: "reward")
    with pretended_cuda() as state:
        scores = torch.ones(2, device="cuda")
        state.on_wait = recorder
        in_range(scores)
    row = wait_table.row_of(recorder.counts)
    assert row == {"reward": {"libraries": 0, "project": {"d2h: flow_rl/rewards/contract.py in_range": 1}}}
    assert wait_table.differences(recorder.counts, row) == []
    (told,) = wait_table.differences(recorder.counts, {})
    assert told.startswith("reward: d2h: flow_rl/rewards/contract.py in_range: 1 waits, 0 in the table. Now at: ")
    assert "flow_rl/rewards/contract.py:" in told
    (told,) = wait_table.differences(Counter(), row)  # fewer: the table must not allow them to come back
    assert "0 waits, 1 in the table" in told
    library = {"reward": {"libraries": 3, "project": row["reward"]["project"]}}
    assert wait_table.differences(recorder.counts, library) == []
