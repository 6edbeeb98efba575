"""The doctor's figures against what is measured on the CPU: exact where it says exact, activations within a fifth."""

from __future__ import annotations

from functools import partial

import bitsandbytes
import pytest
import torch
from torch import nn

from doctor.probe import Load, forward_cost
from doctor.weights import build, count, optimizer_bytes, trained
from lightning_modules.settings import LoraSettings
from models import QwenImage21
from models.adapters import add_lora
from models.qwen_image import QwenImage
from models.tiny_v1 import build_pipeline_v1

PROMPTS = ["a portrait of a person with red hair", "a red pot"]


def saved_bytes(model, conditioning, latents: torch.Tensor, skip: int = 0) -> int:
    """Bytes that autograd keeps of one velocity, each storage once, weights left out: measured, not planned."""
    own = {t.untyped_storage().data_ptr() for t in (*model.transformer.parameters(), *model.transformer.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.velocity(latents, 0.5, conditioning)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.fixture
def v1_model() -> QwenImage:
    return QwenImage(build_pipeline_v1(PROMPTS * 4), image_size=(32, 32))


def fresh(model, lora: bool):
    """Everything trains, or an adapter does."""
    model.transformer.requires_grad_(True)
    if lora:
        add_lora(model.transformer, rank=4, alpha=8, dropout=0.0, targets=model.lora_targets)
    return model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["2.1", "v1"])
def test_activations(family, lora, tiny_pipeline, v1_model) -> None:
    size = (96, 96) if family == "2.1" else (160, 160)
    own = v1_model if family == "v1" else _copy_of(tiny_pipeline)
    model = fresh(own, lora)
    conditioning = model.encode(PROMPTS[:1], size=size).repeat_interleave(4)
    latents = torch.randn(4, *model.latent_shape(*size))
    load = Load(samples=4, prompts=1, text=len(conditioning.embeds[0]), source=0, target=latents.shape[1])
    planned = forward_cost(_on_meta(model.transformer, lora, model), load)
    measured = saved_bytes(model, conditioning, latents)
    assert planned.activations(checkpointing=False) == pytest.approx(measured, rel=0.2)

    model.transformer.enable_gradient_checkpointing()
    model.transformer.train()
    kept = saved_bytes(model, conditioning, latents)
    recomputed = planned.block.saved
    assert kept < 0.8 * measured
    assert planned.activations(checkpointing=True) == pytest.approx(kept + recomputed, rel=0.2)


def _copy_of(pipeline) -> QwenImage21:
    import copy

    return QwenImage21(copy.deepcopy(pipeline), image_size=(32, 32))


def _on_meta(transformer: nn.Module, lora: bool, model) -> nn.Module:
    with torch.device("meta"):
        twin = type(transformer).from_config(transformer.config)
        if lora:
            add_lora(twin, rank=4, alpha=8, dropout=0.0, targets=model.lora_targets)
    return twin


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8)])
def test_parameters_gradients_and_optimizer_are_exact(tiny_path, tiny_pipeline, lora) -> None:
    planned = build(tiny_path, lora)
    model = fresh(_copy_of(tiny_pipeline), lora is not None)
    real = [p for p in model.transformer.parameters() if p.requires_grad]
    for part in ("text_encoder", "vae", "transformer"):
        theirs = getattr(model, part)
        assert count(getattr(planned, part).parameters()) == sum(p.numel() for p in theirs.parameters())
    assert count(trained(planned.transformer)) == sum(p.numel() for p in real)
    make = partial(torch.optim.AdamW, lr=1e-3)
    optimizer = make(real)
    for parameter in real:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert optimizer_bytes(make).total(trained(planned.transformer)) == kept
    assert 4 * count(trained(planned.transformer)) == sum(p.grad.numel() * p.grad.element_size() for p in real)


def test_optimizers_of_fewer_bits_take_less() -> None:
    full = optimizer_bytes(partial(torch.optim.AdamW, lr=1e-3))
    eight = optimizer_bytes(partial(bitsandbytes.optim.AdamW8bit, lr=1e-3))
    assert full.a_value == 8
    assert 2 <= eight.a_value < 2.1  # two bytes, and the block scales
    assert optimizer_bytes(partial(torch.optim.SGD, lr=1e-3)).a_value == 0


def test_operations_of_a_block_are_those_of_its_layers() -> None:
    """Two operations a weight and token, and attention's 4 S (S + L) D: counted by hand."""
    parts = build("Qwen/Qwen-Image-2.1")
    load = Load(samples=2, prompts=1, text=100, source=0, target=4096)
    cost = forward_cost(parts.transformer, load)
    layers = sum(p.numel() for n, p in parts.transformer.transformer_blocks[0].named_parameters() if p.ndim == 2)
    tokens, dim = 2 * 4096 + 104, 4096
    attention = 4 * dim * (2 * 4096 * (4096 + 100) + 100 * 100 + 4 * 104)
    assert cost.block.flops == pytest.approx(2 * layers * tokens + attention, rel=1e-3)
