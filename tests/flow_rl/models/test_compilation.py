"""Compiled blocks: whole graphs, none for new prompt lengths, the eager values, the same parameter names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from flow_rl.models import QwenImage21
from flow_rl.models.compilation import compile_blocks, repeated_blocks
from flow_rl.models.tiny.qwen_image_21 import build_pipeline, build_transformer

#: of different lengths
PROMPTS = ["a red pot", "a portrait of a person with red hair", "a tulip in a blue pot, yellow background"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def model_of(*, num_layers: int = 2, checkpointing: bool = False) -> QwenImage21:
    pipeline = build_pipeline(PROMPTS * 4)
    torch.manual_seed(1)
    pipeline.transformer = build_transformer(num_layers=num_layers)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model = QwenImage21(pipeline, image_size=(32, 32))
    model.transformer.requires_grad_(True).train()
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    return model


def evaluate(model: QwenImage21, prompts: list[str]) -> list[Tensor]:
    """A rollout's velocity, an update's, and all gradients of the update's."""
    conditioning = model.encode(prompts)
    latents = torch.randn(3 * len(prompts), *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rollout = model.velocity(latents, 0.7, model.cache_prefix(conditioning).repeat_interleave(3))
    update = model.velocity(latents, 0.4, conditioning.repeat_interleave(3))
    update.square().sum().backward()
    gradients = [p.grad.clone() for p in model.transformer.parameters() if p.grad is not None]
    model.transformer.zero_grad(set_to_none=True)
    return [rollout, update.detach(), *gradients]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_new_prompt_lengths_need_no_new_graph(checkpointing: bool) -> None:
    model, eager = model_of(checkpointing=checkpointing), model_of(checkpointing=checkpointing)
    names = list(model.state_dict())
    compile_blocks(model, backend="eager")
    graphs = []
    for prompt in PROMPTS:
        for ours, theirs in zip(evaluate(model, [prompt]), evaluate(eager, [prompt]), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len({len(model.encode([prompt]).embeds[0]) for prompt in PROMPTS}) == 3
    assert 0 < graphs[0] == graphs[-1]
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the C++ compiler takes minutes on a busy machine
def test_inductor_gives_the_eager_values() -> None:
    model, eager = model_of(num_layers=1), model_of(num_layers=1)
    compile_blocks(model)
    for ours, theirs in zip(evaluate(model, PROMPTS[:1]), evaluate(eager, PROMPTS[:1]), strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, atol=1e-4 * scale + 1e-7, rtol=1e-3)


def test_a_transformer_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="has no repeated blocks"):
        repeated_blocks(nn.Linear(2, 2))
