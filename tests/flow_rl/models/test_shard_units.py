"""What each family says is spread over the ranks: all of the transformer and the text encoder, each weight once."""

from __future__ import annotations

import pytest
from diffusers import DiffusionPipeline

from flow_rl.models import QwenImage21
from flow_rl.models.qwen_image import QwenImage
from flow_rl.models.tiny.qwen_image import build_pipeline_v1


@pytest.mark.parametrize("family", ["qwen_image_21", "t2i", "edit_plus"])
def test_transformer_and_text_encoder_are_in_units_and_the_image_decoder_is_not(tiny_pipeline, family: str) -> None:
    pipeline: DiffusionPipeline = tiny_pipeline if family == "qwen_image_21" else build_pipeline_v1(["a"], kind=family)
    make = QwenImage21 if family == "qwen_image_21" else QwenImage
    units = make(pipeline, image_size=(32, 32)).shard_units()
    inside = [id(p) for unit in units for p in unit.root.parameters()]
    assert len(inside) == len(set(inside)), "a weight is in two units"
    expected = {id(p) for part in (pipeline.transformer, pipeline.text_encoder) for p in part.parameters()}
    assert set(inside) == expected
    for unit in units:
        modules = set(map(id, unit.root.modules()))
        assert all(id(block) in modules for block in unit.blocks)
    # What no block holds is gathered with the root, and stays: the blocks must be most of the transformer.
    blocks = sum(p.numel() for block in units[0].blocks for p in block.parameters())
    assert blocks > 0.5 * sum(p.numel() for p in units[0].root.parameters())
    layers = pipeline.text_encoder.model.language_model.layers
    assert {id(layer) for layer in layers} <= {id(block) for unit in units[1:] for block in unit.blocks}
