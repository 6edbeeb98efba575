"""Models whose weights stay on disk: no memory for parameters, real buffers, and every tensor found by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flow_rl.models import load_image_model
from flow_rl.models.adapters import add_lora
from flow_rl.models.stored import StoredComponent, component_class, standing_in
from flow_rl.models.tiny.qwen_image import build_pipeline_v1


@pytest.fixture(scope="module", params=["qwen_image_21", "qwen_image"])
def path(request, tiny_path, tmp_path_factory) -> str:
    if request.param == "qwen_image_21":
        return tiny_path
    made = tmp_path_factory.mktemp("stored") / "v1"
    build_pipeline_v1(["a red pot"] * 4).save_pretrained(made)
    return str(made)


def test_parameters_have_no_memory_and_buffers_are_those_of_from_pretrained(path) -> None:
    empty, whole = (load_image_model(path, image_size=(32, 32), empty=e) for e in (True, False))
    for part in ("transformer", "text_encoder"):
        assert all(p.is_meta for p in getattr(empty, part).parameters())
        assert not getattr(empty, part).training
        shapes = [{n: (p.shape, p.dtype) for n, p in getattr(m, part).named_parameters()} for m in (empty, whole)]
        assert shapes[0] == shapes[1]
    buffers = [dict(m.named_buffers()) for m in (empty, whole)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffer, buffers[1][name]) for name, buffer in buffers[0].items())
    tied = [m.text_encoder.lm_head.weight is m.text_encoder.get_input_embeddings().weight for m in (empty, whole)]
    assert tied[0] is tied[1]


def test_every_parameter_is_read_by_its_name(path) -> None:
    empty, whole = (load_image_model(path, image_size=(32, 32), empty=e) for e in (True, False))
    add_lora(empty.transformer, rank=2, alpha=2, dropout=0.0, targets=empty.lora_targets)
    names = [n for n, p in empty.named_parameters() if p.is_meta]
    assert empty.stored.missing(names) == []
    assert empty.stored.missing(["vae.nothing", "transformer.nothing"]) == ["vae.nothing", "transformer.nothing"]
    expected = dict(whole.named_parameters())
    for name in names:
        assert torch.equal(empty.stored.read(name), expected[name.replace(".base_layer", "")]), name


def test_an_adapter_gets_its_own_values_although_its_layers_have_none(path) -> None:
    made = []
    for empty in (True, False):
        model = load_image_model(path, image_size=(32, 32), empty=empty)
        torch.manual_seed(0)
        add_lora(model.transformer, rank=2, alpha=2, dropout=0.0, targets=model.lora_targets)
        made.append({n: p for n, p in model.transformer.named_parameters() if ".lora_" in n})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_standing_in_costs_no_memory_and_ends() -> None:
    layer = torch.nn.Linear(1000, 1000, device="meta")
    held = layer.weight
    with standing_in(layer):
        assert layer.weight.device.type == "cpu"
        assert layer.weight.untyped_storage().nbytes() == 4
    assert layer.weight is held


def test_several_files_and_files_with_other_names(tmp_path, tiny_path) -> None:
    """An index of two files, and a text encoder that an older transformers named otherwise."""
    source = Path(tiny_path) / "text_encoder"
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: state[name] for name in own}, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in halves.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    kind = component_class(Path(tiny_path), "text_encoder")
    reader = StoredComponent(tmp_path, kind)
    assert reader.missing(names) == []
    assert all(torch.equal(reader.read(name), state[name]) for name in names)
    own = [name for name, _ in kind.from_pretrained(str(source)).named_parameters()]
    assert StoredComponent(tmp_path, kind).missing([*own, "unheard_of"]) == ["unheard_of"]
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model"):
        StoredComponent(tmp_path, kind)
