"""Two ranks load a model in shards: the weights are those of `from_pretrained`, and neither rank ever holds them all."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.dist.dist_loading import run_loading
from tests.processes import launch

from flow_rl.models.tiny.qwen_image import build_pipeline_v1

pytestmark = pytest.mark.dist

MODELS = ("2.1", "2.1, adapter", "v1", "v1, adapter", "reward model")


@pytest.fixture(scope="module")
def found(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    directory = tmp_path_factory.mktemp("loading")
    build_pipeline_v1(["a red pot", "make it red"] * 4, kind="t2i").save_pretrained(directory / "v1")
    generators = {"2.1": files["generator"], "v1": str(directory / "v1")}
    launch(partial(run_loading, str(directory / "record"), 2, generators, files["vlm"]), 2)
    return [torch.load(directory / f"record.{rank}", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("model", MODELS)
def test_weights_and_buffers_are_those_of_from_pretrained_bit_for_bit(found, model: str) -> None:
    for rank in found:
        assert rank[model]["differing"] == []
        assert rank[model]["buffers"] > 0, "rotary tables are among them"
        assert rank[model]["requires"]
        assert rank[model]["same outputs"], "what is no buffer either, such as complex rotary tables, is right as well"


@pytest.mark.parametrize("model", MODELS)
def test_no_rank_holds_more_than_its_half_and_what_is_on_its_way(found, model: str) -> None:
    for number, rank in enumerate(found):
        loaded = rank[model]
        assert loaded["held"] == pytest.approx(loaded["whole"] / 2, rel=0.05)
        if number == 1:  # the first rank reads the text encoder whole where its files have other names
            allowed = loaded["whole"] / 2 * 1.05 + 2 * loaded["largest"]  # a tensor whole, and its piece
            assert loaded["held"] <= loaded["peak"] <= allowed
            assert allowed < 0.9 * loaded["whole"], "the bound would not notice a whole copy"


def test_a_tensor_that_is_missing_or_of_another_shape_is_refused_on_every_rank(found) -> None:
    for rank in found:
        assert "lack 1 of its" in rank["refused"]["unheard_of"]
        assert "transformer.unheard_of" in rank["refused"]["unheard_of"]
        assert "'transformer.proj_out.weight' has shape" in rank["refused"]["proj_out.weight"]
        assert "by its config it has (4, 4)" in rank["refused"]["proj_out.weight"]
