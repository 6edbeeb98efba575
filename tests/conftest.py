"""A tiny pipeline with random weights that are large enough to matter."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImage21Pipeline

from models import QwenImage21
from models.tiny import build_pipeline


@pytest.fixture(scope="session")
def tiny_pipeline() -> QwenImage21Pipeline:
    pipeline = build_pipeline(["a portrait of a person with red hair", "a tulip in a blue pot, yellow background"] * 4)
    generator = torch.Generator().manual_seed(1)
    weight = pipeline.transformer.proj_out.weight
    with torch.no_grad():  # a fresh model's last layer is zero, and its velocity with it
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return pipeline


@pytest.fixture
def tiny_model(tiny_pipeline: QwenImage21Pipeline) -> QwenImage21:
    return QwenImage21(tiny_pipeline, image_size=(32, 32))
