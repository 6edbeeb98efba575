"""The doctor's figures against what is measured on the CPU: exact where it says exact, activations within a tenth."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn

from flow_rl.models import QwenImage21
from flow_rl.models.adapters import LoraSettings, add_lora
from flow_rl.models.pipeline_model import PipelineModel
from flow_rl.models.qwen_image import QwenImage
from flow_rl.models.tiny.qwen_image import build_pipeline_v1
from flow_rl.models.tiny.qwen_image_21 import build_pipeline
from flow_rl.planning import bench
from flow_rl.planning.bench import Case, Precision, denoising, update
from flow_rl.planning.meter import Reading, hollow
from flow_rl.planning.report import operations
from flow_rl.planning.weights import build, count, optimizer_bytes, step_bytes, trained

FULL = Precision(trained=torch.float32, frozen=torch.float32, text=torch.float32)
PROMPTS = ["a portrait of a person with red hair", "a red pot"]


def live_bytes(model, conditioning, latents: torch.Tensor) -> int:
    """Bytes that autograd keeps of one velocity, each storage once, weights left out: measured on the CPU."""
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
def models(tmp_path) -> dict[str, tuple[PipelineModel, str]]:
    """A toy of each family, as deep as the demo's, and where it is saved."""
    pipelines = {"2.1": build_pipeline(PROMPTS * 4), "v1": build_pipeline_v1(PROMPTS * 4)}
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / name)
    kinds = {"2.1": QwenImage21, "v1": QwenImage}
    return {
        name: (kinds[name](pipeline, image_size=(32, 32)), str(tmp_path / name)) for name, pipeline in pipelines.items()
    }


def fresh(model, lora: LoraSettings | None):
    """Everything trains, or an adapter does."""
    model.transformer.requires_grad_(True)
    if lora is not None:
        add_lora(model.transformer, **vars(lora), targets=model.lora_targets)
    return model


def loss_of_velocity(model, conditional, _unconditional):
    """The least that has a gradient."""
    latents = hollow(len(conditional), *model.latent_shape(*model.image_size))
    return lambda: model.velocity(latents, 0.5, conditional).sum()


LORA = LoraSettings(rank=4, alpha=8)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("family", ["2.1", "v1"])
def test_activations(family, lora, models) -> None:
    size = 96 if family == "2.1" else 160
    model, path = models[family]
    model = fresh(model, lora)
    conditioning = model.encode(PROMPTS[:1], size=(size, size)).repeat_interleave(4)
    latents = torch.randn(4, *model.latent_shape(size, size))
    case = Case(
        path=path, precision=FULL, size=size, samples=4, prompts=1, text=len(conditioning.embeds[0]), edit=False,
        sharded=False,
    )  # fmt: skip
    parts = build(path, lora)
    measured = live_bytes(model, conditioning, latents)
    planned = update(parts, case, loss_of_velocity, guided=False, checkpointing=False)
    assert planned.forward.kept == pytest.approx(measured, rel=0.1)

    model.transformer.enable_gradient_checkpointing()
    model.transformer.train()
    kept = live_bytes(model, conditioning, latents)
    planned = update(parts, case, loss_of_velocity, guided=False, checkpointing=True)
    # Hooks see what is saved, but not the blocks' inputs, which recomputation holds besides.
    assert kept <= planned.forward.kept < planned.peak < measured


def test_shallow_transformers_tell_the_bytes_of_a_deep_one(tiny_path) -> None:
    """Of a whole and sharded one: gradients of every block wait for the prefix, and must not be missed."""
    directory = Path(tiny_path)
    parts = deepened(build(str(directory)), blocks=6)
    case = Case(
        path=str(directory), precision=FULL, size=128, samples=4, prompts=1, text=16, edit=False, sharded=True
    )  # fmt: skip
    told = update(parts, case, loss_of_velocity, guided=False, checkpointing=True)
    whole = bench.SHALLOW
    try:
        bench.SHALLOW = (6, 6)
        update.cache_clear()
        run = update(parts, case, loss_of_velocity, guided=False, checkpointing=True)
    finally:
        bench.SHALLOW = whole
        update.cache_clear()
    for ours, theirs in ((told.forward, run.forward), (told.backward, run.backward)):
        assert ours.peak == pytest.approx(theirs.peak, rel=0.01)
        assert ours.flops == pytest.approx(theirs.flops, rel=0.01)


def deepened(parts, blocks: int):
    """The same parts with so many blocks."""
    made = parts.transformer.transformer_blocks
    parts.transformer.transformer_blocks = nn.ModuleList(copy.deepcopy(made[0]) for _ in range(blocks))
    return parts


def test_deeper_goes_on_as_two_readings_began() -> None:
    one, two = Reading(peak=10, kept=4, flops=1.0), Reading(peak=13, kept=5, flops=3.0)
    assert one.deeper(two, 0) == two
    assert one.deeper(two, 2) == Reading(peak=19, kept=7, flops=7.0)


@pytest.mark.parametrize("lora", [None, LORA])
def test_parameters_gradients_and_optimizer_are_exact(tiny_path, tiny_pipeline, lora) -> None:
    planned = build(tiny_path, lora)
    model = fresh(QwenImage21(copy.deepcopy(tiny_pipeline), image_size=(32, 32)), lora)
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


def test_what_a_step_makes_for_itself() -> None:
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    assert step_bytes(adamw) == pytest.approx(4, rel=0.01)  # torch's lists of tensors take one copy of all of them
    assert step_bytes(partial(torch.optim.AdamW, lr=1e-3, fused=True)) == pytest.approx(0, abs=0.01)
    assert step_bytes(partial(bitsandbytes.optim.AdamW8bit, lr=1e-3)) == 0


def test_operations_of_an_evaluation_are_those_of_its_layers() -> None:
    """Two operations a weight and token, and attention's 4 S (S + L) D a block: counted by hand."""
    path, samples, text, target = "Qwen/Qwen-Image-2.1", 2, 100, 4096
    parts = build(path)
    case = Case(
        path=path, precision=FULL, size=1024, samples=samples, prompts=1, text=text, edit=False, sharded=False
    )  # fmt: skip
    blocks = parts.transformer.transformer_blocks
    layers = sum(p.numel() for n, p in blocks.named_parameters() if p.ndim == 2)
    attention = len(blocks) * 4 * parts.transformer.inner_dim * samples * target * (target + text)
    evaluation = denoising(parts, case, False).conditional
    assert evaluation.flops == pytest.approx(2 * layers * samples * target + attention, rel=2e-3)


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0.0 FLOP"), (12_500, "12.5 kFLOP"), (3.2e9, "3.2 GFLOP"), (1.2345e16, "12,345.0 TFLOP")]
)
def test_operations_have_a_unit_that_suits_them(count, said) -> None:
    assert operations(count) == said
