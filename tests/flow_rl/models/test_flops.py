"""Operations counted from shapes against torch's own counter, which watches the kernels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flow_rl.models import QwenImage21
from flow_rl.models.adapters import add_lora
from flow_rl.models.tiny.qwen_image_21 import build_pipeline

SHORT, LONG = "a red pot", "a tulip in a blue pot, yellow background"


def counted(model: QwenImage21, work) -> tuple[float, float]:
    """Operations by our count and by torch's."""
    ours: list[float] = []
    model.on_flops = ours.append
    try:
        # Attention as plain matrix products: the counter does not know the CPU's fused kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
    finally:
        model.on_flops = None
    return sum(ours), float(counter.get_total_flops())


@pytest.mark.parametrize("edit", [False, True], ids=["t2i", "edit"])
def test_joint_cached_and_padded_forwards(tiny_model, edit: bool) -> None:
    sources = torch.rand(2, 3, 32, 32) if edit else None
    alone = tiny_model.encode([SHORT], None if sources is None else sources[:1])
    both = tiny_model.encode([SHORT, LONG], sources).repeat_interleave(4)
    latents = torch.randn(8, 16, 32)
    with torch.no_grad():
        cached = tiny_model.cache_prefix(alone).repeat_interleave(8)
        for name, conditioning, x in (
            ("joint", alone, latents[:1]),
            ("cached", cached, latents),
            ("extract and padded", both, latents),
        ):
            ours, theirs = counted(tiny_model, lambda c=conditioning, x=x: tiny_model.velocity(x, 0.5, c))
            assert ours == pytest.approx(theirs, rel=0.01), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_forward_and_backward(lora: bool) -> None:
    model = QwenImage21(build_pipeline([SHORT, LONG]), image_size=(32, 32))
    model.transformer.requires_grad_(True)
    if lora:
        add_lora(model.transformer, rank=4, alpha=8, dropout=0.0, targets=model.lora_targets)
    conditioning = model.encode([SHORT, LONG]).repeat_interleave(8)
    latents = torch.randn(16, 16, 32)

    ours, theirs = counted(model, lambda: model.velocity(latents, 0.5, conditioning).square().mean().backward())
    assert ours == pytest.approx(theirs, rel=0.03)


def test_recomputation_does_not_count() -> None:
    """A model's utilisation is of the operations that it needs; torch's counter sees those that are repeated, too."""
    model = QwenImage21(build_pipeline([SHORT, LONG]), image_size=(32, 32))
    model.transformer.requires_grad_(True).train()
    conditioning = model.encode([SHORT, LONG]).repeat_interleave(8)
    latents = torch.randn(16, 16, 32)

    def update() -> None:
        model.velocity(latents, 0.5, conditioning).square().mean().backward()

    plain, kernels = counted(model, update)
    model.transformer.enable_gradient_checkpointing()
    checkpointed, repeated = counted(model, update)
    assert checkpointed == plain
    assert repeated > 1.25 * kernels  # nearly a forward more than the forward and the backward, which is twice as much


def test_nothing_is_counted_where_nobody_listens(tiny_model) -> None:
    conditioning = tiny_model.encode([SHORT])
    velocity = tiny_model.velocity(torch.randn(1, 16, 32), 0.5, conditioning)
    assert tiny_model.on_flops is None
    assert velocity.shape == (1, 16, 32)
