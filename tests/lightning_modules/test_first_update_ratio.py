"""The ratio is 1 to the last bit at the first update, whatever the objective, sampler, dtype, weights and cut."""

from __future__ import annotations

import pytest
import torch

from flow_rl.batches import Prompts
from flow_rl.models.adapters import LoraSettings
from flow_rl.rl.shadow_weights import ShadowWeights
from lightning_modules import GRPOPolicy

BATCH = Prompts(
    ids=(11, 12),
    texts=("a portrait of a person with red hair", "a red pot"),  # of different length
    categories=("portrait", "plant"),
)
LORA = LoraSettings(rank=4, alpha=8)
SMALL = {"group_size": 2}
ADVANTAGES = torch.linspace(-1, 1, 4)
SIZES = (1, 3, 64)  # pairs a micro-batch, of 8

#: guarded with cps is refused (docs/settings_refused.md)
GRADIENTS = [(kind, t) for kind in ("clipped", "guarded") for t in ("flow_sde", "cps", "dance")]
GRADIENTS.remove(("guarded", "cps"))


def made(module: GRPOPolicy, dtype: torch.dtype) -> GRPOPolicy:
    """Ready to update: the frozen or trained weights in `dtype`, adapters in float32 and off zero."""
    module.configure_model()
    module.model.transformer.train()
    module.manual_backward = lambda loss: loss.backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.model.transformer.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
        elif "lora_B" in name:  # a fresh adapter is zero and would hide a mistake
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return module


def cut(module: GRPOPolicy, size: int) -> None:
    module.objective.micro_batch_size = size


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("kind", "transition", "dtype"),
    [
        # bfloat16 is slow on a CPU, and the two objectives share what makes the ratio
        pytest.param(kind, t, dtype, marks=pytest.mark.slow if (kind, dtype) == ("guarded", torch.bfloat16) else [])
        for kind, t in GRADIENTS
        for dtype in (torch.float32, torch.bfloat16)
    ],
    ids=lambda value: {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(value, str(value)),
)
def test_policy_gradient(policy, kind, transition, dtype, lora) -> None:
    noise = {"noise_level": 0.3} if transition == "dance" else {}
    module = made(
        policy(kind, rollout=SMALL | {"transition": transition} | noise, objective={"updates": 2}, lora=lora), dtype
    )
    rollout = module.roll_out(BATCH)
    for size in SIZES:
        cut(module, size)
        prepared = module.prepare(rollout, 0)
        assert prepared["log_prob"].shape == (2, 4)
        metrics = module.accumulate_gradients(rollout, ADVANTAGES, prepared)
        assert float(metrics["ratio_deviation_max"]) == 0.0, size
        assert float(metrics["clip_fraction"]) == 0.0, size


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nft_starts_at_its_old_policy(policy, dtype, lora) -> None:
    """NFT has no ratio; what must be 0 is the distance to the old policy's velocity."""
    module = policy("nft", rollout=SMALL, objective={"reference_weight": 0.0}, lora=lora)
    module = made(module, dtype)
    module.old = ShadowWeights(module.model.transformer)  # anew: dtype and adapter were changed after the first copy
    rollout = module.roll_out(BATCH)
    for size in SIZES:
        cut(module, size)
        metrics = module.accumulate_gradients(rollout, ADVANTAGES, module.prepare(rollout, 0))
        assert float(metrics["old_deviation"]) == 0.0, size


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_guidance_in_both(policy, lora) -> None:
    """Guided on both sides of the ratio, it is 1 just as well."""
    module = made(
        policy("clipped", rollout=SMALL | {"cfg": "both"}, objective={"updates": 2}, lora=lora), torch.float32
    )
    rollout = module.roll_out(BATCH)
    metrics = module.accumulate_gradients(rollout, ADVANTAGES, module.prepare(rollout, 0))
    assert float(metrics["ratio_deviation_max"]) == 0.0
