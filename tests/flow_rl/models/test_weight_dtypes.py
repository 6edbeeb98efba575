"""Generators load in the dtype that is kept: the weights of a float32 load rounded once, and exact buffers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flow_rl.models import ImageModel, load_image_model
from flow_rl.models.memory import WeightDtypes
from flow_rl.models.tiny.qwen_image import build_pipeline_v1
from tests.peak_memory import PeakMemory

SIZE = (32, 32)
KEPT = {"full": WeightDtypes.kept("bfloat16", adapter=False), "adapter": WeightDtypes.kept("bfloat16", adapter=True)}


@pytest.fixture(scope="module", params=["qwen_image_21", "qwen_image"])
def path(request, tiny_path, tmp_path_factory) -> str:
    if request.param == "qwen_image_21":
        return tiny_path
    made = tmp_path_factory.mktemp("dtypes") / "v1"
    build_pipeline_v1(["a red pot"] * 4).save_pretrained(made)
    return str(made)


def tables(module: nn.Module) -> dict[str, Tensor]:
    """Buffers, and the tensors that are none, such as complex rotary tables."""
    found = dict(module.named_buffers())
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            values = value if isinstance(value, list) else [value]
            found |= {f"{name}.{key}.{i}": v for i, v in enumerate(values) if isinstance(v, Tensor)}
    return found


@pytest.mark.parametrize("case", KEPT)
def test_weights_are_the_rounded_ones_and_tables_are_not_rounded(path: str, case: str) -> None:
    reference = DiffusionPipeline.from_pretrained(path)  # all of it in float32
    model = load_image_model(path, image_size=SIZE, dtypes=KEPT[case])
    bfloat16 = {"full": ("text_encoder",), "adapter": ("text_encoder", "transformer")}[case]
    for part in ("transformer", "text_encoder", "vae"):
        expected, found = getattr(reference, part), getattr(model, part)
        dtype = torch.bfloat16 if part in bfloat16 else torch.float32
        weights = dict(found.named_parameters())
        assert weights.keys() == dict(expected.named_parameters()).keys()
        for name, weight in expected.named_parameters():
            assert weights[name].dtype == dtype
            assert torch.equal(weights[name], weight.to(dtype)), name
        own = tables(found)
        for name, table in tables(expected).items():
            assert own[name].dtype == table.dtype != torch.bfloat16
            assert torch.equal(own[name], table), name
    assert model.latents_mean.dtype == torch.float32


@pytest.mark.parametrize("case", KEPT)
def test_a_model_without_weights_has_the_same_dtypes_and_tables(path: str, case: str) -> None:
    empty, whole = (load_image_model(path, image_size=SIZE, dtypes=KEPT[case], empty=e) for e in (True, False))
    for part in ("transformer", "text_encoder"):
        assert all(p.is_meta for p in getattr(empty, part).parameters())
    assert dtypes(empty) == dtypes(whole)
    own = tables(empty)
    assert own.keys() == tables(whole).keys()
    assert all(
        torch.equal(own[name], table) and own[name].dtype == table.dtype for name, table in tables(whole).items()
    )


def dtypes(model: ImageModel) -> dict[str, torch.dtype]:
    return {name: p.dtype for name, p in model.named_parameters()}


def test_frozen_parts_never_take_more_than_half_of_the_memory(path: str, tmp_path) -> None:
    released = DiffusionPipeline.from_pretrained(path, dtype=torch.bfloat16)  # as checkpoints of real models are stored
    released.save_pretrained(tmp_path)
    held = {}
    for name, kept in {"float32": WeightDtypes(), **KEPT}.items():
        with PeakMemory() as memory:
            model = load_image_model(tmp_path, image_size=SIZE, dtypes=kept)
        held[name] = {part: size(getattr(model, part)) for part in ("transformer", "text_encoder", "vae")}
        held[name]["peak"] = memory.peak
    whole = held["float32"]
    assert held["full"] == whole | {"text_encoder": whole["text_encoder"] / 2, "peak": held["full"]["peak"]}
    assert held["adapter"] == held["full"] | {"transformer": whole["transformer"] / 2, "peak": held["adapter"]["peak"]}
    # The text encoder is read by threads, whose tensors the count does not see.
    assert whole["peak"] - held["adapter"]["peak"] >= 0.9 * held["adapter"]["transformer"]


def size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
