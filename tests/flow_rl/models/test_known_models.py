"""The cards of released models: their configs build diffusers' own classes, at the sizes that were published."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from flow_rl.models.loading import (
    CARDS,
    FAMILIES,
    check_model_path,
    config_directory,
    known_models,
    peek_grid,
    read_config,
)

#: parameters of the transformer that a config with the class's defaults builds
SIZES = {"Qwen/Qwen-Image-2.1": 7_115_124_736, "Qwen/Qwen-Image": 20_430_401_088}


@pytest.mark.parametrize("name", known_models())
def test_card_builds_the_class_with_its_own_defaults(name: str) -> None:
    check_model_path(name)
    index = json.loads((CARDS / name / "model_index.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        for part in ("transformer", "vae"):
            kind = getattr(diffusers, index[part][1])
            carded, default = kind.from_config(read_config(name, part)), kind()
            assert {n: p.shape for n, p in carded.named_parameters()} == {
                n: p.shape for n, p in default.named_parameters()
            }
            if part == "transformer" and name in SIZES:
                assert sum(p.numel() for p in carded.parameters()) == SIZES[name]


def test_geometry_of_the_released_models() -> None:
    assert peek_grid("Qwen/Qwen-Image-2.1", (1024, 1024)) == (64, 64)
    assert peek_grid("Qwen/Qwen-Image", (1024, 1024)) == (64, 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        peek_grid("Qwen/Qwen-Image-2.1", (1000, 1024))


def test_unknown_id_suggests_the_nearest_and_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'Qwen/Qwen-Image-2.1'.*hf download"):
        config_directory("Qwen/Qwen-Image2.1")


def test_every_card_says_where_its_numbers_come_from() -> None:
    assert set(FAMILIES) == {check_model_path(name) for name in known_models()}
    for name in known_models():
        card = json.loads((CARDS / name / "card.json").read_text(encoding="utf-8"))
        assert set(card) == {"dimensions", "sampling"}
        assert set(card["dimensions"]) == {"transformer", "vae", "text_encoder", "scheduler"}
        assert card["sampling"]["source"]
