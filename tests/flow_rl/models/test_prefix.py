"""Keys and values of a prompt serve all of its samples: no copies, and the copies' bits and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flow_rl.models import Conditioning, QwenImage21
from flow_rl.models.qwen_image_21_prefix import OnePrompt

SHORT, LONG, OTHER = "a red pot", "a tulip in a blue pot, yellow background", "a blue pot"
SAMPLES = 5


def conditioning_of(model: QwenImage21, prompts: list[str], *, edit: bool = False) -> Conditioning:
    sources = torch.rand(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(1)) if edit else None
    return model.cache_prefix(model.encode(prompts, sources)).repeat_interleave(SAMPLES)


def bytes_held(tensors: list[Tensor]) -> int:
    """Of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("edit", [False, True])
def test_samples_of_one_prompt_share_its_storage(tiny_model: QwenImage21, edit: bool) -> None:
    conditioning = conditioning_of(tiny_model, [LONG], edit=edit)
    prefix = conditioning.prefix
    batch = prefix.batch(conditioning.rows.tolist())
    for number, layer in enumerate(prefix.cache.layer_caches):
        keys, values = batch.get_layer(number).get()
        assert keys.shape == (SAMPLES, *layer.k.shape[1:])
        assert keys.untyped_storage().data_ptr() == layer.k.untyped_storage().data_ptr()
        assert values.untyped_storage().data_ptr() == layer.v.untyped_storage().data_ptr()


@pytest.mark.parametrize("prompts", [[SHORT, OTHER], [SHORT, LONG]], ids=["same length", "padded"])
def test_a_batch_of_several_prompts_keeps_no_copy_a_sample(tiny_model: QwenImage21, prompts: list[str]) -> None:
    conditioning = conditioning_of(tiny_model, prompts)
    lengths = conditioning.prefix.lengths
    assert (len(set(lengths)) == 1) == (OTHER in prompts)
    latents = torch.randn(2 * SAMPLES, *tiny_model.latent_shape(32, 32))
    with torch.no_grad():
        tiny_model.velocity(latents, 0.5, conditioning)

    def tensors(thing: object, found: dict[int, Tensor]) -> dict[int, Tensor]:
        if isinstance(thing, Tensor):
            found[id(thing)] = thing
        elif isinstance(thing, dict | list | tuple):
            for part in thing.values() if isinstance(thing, dict) else thing:
                tensors(part, found)
        elif hasattr(thing, "__dict__"):
            tensors(vars(thing), found)
        return found

    layers = conditioning.prefix.cache.layer_caches
    own = bytes_held([t for layer in layers for t in (layer.k, layer.v)])
    held = bytes_held(list(tensors(conditioning.prefix._made, {}).values()))
    assert held < own * 1.2  # the caches themselves, and indices


@pytest.mark.parametrize("grad", [False, True])
def test_the_view_gives_the_bits_of_copies(tiny_model: QwenImage21, grad: bool, monkeypatch) -> None:
    """Against keys and values that are indexed sample by sample, as a batch of several prompts does it."""
    transformer = tiny_model.transformer.requires_grad_(grad)
    conditioning = tiny_model.encode([LONG]).repeat_interleave(SAMPLES)
    latents = torch.randn(SAMPLES, *tiny_model.latent_shape(32, 32))

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            velocity = tiny_model.velocity(latents, 0.5, conditioning)
        if not grad:
            return [velocity]
        velocity.square().sum().backward()
        gradients = [p.grad for p in transformer.parameters() if p.grad is not None]
        transformer.zero_grad(set_to_none=True)
        return [velocity.detach(), *gradients]

    try:
        viewed = run()
        monkeypatch.setattr(
            OnePrompt, "values", lambda self, t: t[torch.full((self.samples,), self.index), : self.length]
        )
        copied = run()
    finally:
        transformer.requires_grad_(False)
    assert len(viewed) == len(copied) > (20 if grad else 0)
    assert all(torch.equal(a, b) for a, b in zip(viewed, copied, strict=True))


def test_gradients_of_a_view_sum_over_the_samples() -> None:
    layout = OnePrompt(index=1, length=7, samples=24)
    cached = torch.randn(2, 9, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(24, 7, 3, 4).bfloat16()
    layout.values(cached).backward(upstream)
    expected = torch.zeros(2, 9, 3, 4, dtype=torch.float64)
    expected[1, :7] = upstream.double().sum(dim=0)
    assert torch.equal(cached.grad, expected.to(torch.bfloat16))  # rounded once, whatever the number of samples
    assert torch.autograd.gradcheck(layout.values, torch.randn(2, 9, 1, 2, dtype=torch.float64, requires_grad=True))


def test_the_layout_is_made_once_for_a_rollout(tiny_model: QwenImage21) -> None:
    conditioning = conditioning_of(tiny_model, [SHORT, LONG])
    rows = conditioning.rows.tolist()
    first = conditioning.prefix.batch(rows)
    assert conditioning.prefix.batch(rows) is first
    assert conditioning.prefix.batch(rows[::-1]) is not first
    part = replace(conditioning, rows=conditioning.rows[:3])
    assert part.prefix is conditioning.prefix
