"""The ratio is 1 to the last bit at the first update.

By dtype, transition, objective, micro-batch, checkpointing and LoRA. Rollout and update evaluate batches of different
sizes, with and without gradient. On a GPU each may use other kernels: it depends on the device as well as on the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.machine import tf32
from benchmarks.gpu.parity import BASE, SIZE
from benchmarks.gpu.policies import OBJECTIVES
from benchmarks.gpu.rewards import PixelReward
from flow_rl.batches import Prompts
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.windows import WindowSettings
from flow_rl.models.adapters import LoraSettings
from flow_rl.rl.objectives import Objective
from flow_rl.rl.settings import RolloutSettings
from flow_rl.rl.shadow_weights import ShadowWeights
from lightning_modules import GRPOPolicy

PROMPTS = Prompts(
    ids=(11, 12),
    texts=("a person with red hair", "a potted tulip in a blue pot on a yellow background"),  # of different length
    categories=("portrait", "plant"),
)
ADVANTAGES = torch.linspace(-1, 1, 4)
#: pairs a micro-batch, of 8
SIZES = (1, 3, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRANSITIONS = ("flow_sde", "cps", "dance")
LORA = LoraSettings(rank=4, alpha=8)
#: dtype, transition and adapter of what a CPU checks here; the project's tests check all of it
TINY = (("float32", "flow_sde", True), ("float32", "ode", False))


def made(bench: Bench, kind: str, transition: str, dtype: torch.dtype, *, lora: bool) -> GRPOPolicy:
    """A policy on the device, ready to update: base weights in `dtype`, adapters in float32 and off zero."""
    module = GRPOPolicy(
        model_path=BASE,
        image_size=SIZE[0],
        rewards={"pixels": PixelReward()},
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        rollout=RolloutSettings(
            num_steps=4,
            group_size=2,
            guidance=Guidance(scale=2.5, low=0.6),
            transition=transition,
            noise_level=0.3 if transition == "dance" else 0.7,
            window=WindowSettings(count=2, fraction=0.75),
        ),
        objective=objective_of(kind, 32),
        lora=LORA if lora else None,
    )
    module.configure_model()
    module.manual_backward = lambda loss: loss.backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.model.transformer.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
        elif "lora_B" in name:  # a fresh adapter is zero and would hide a mistake
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    module.model.to(bench.device)
    module.model.transformer.train()
    return module


def use(module: GRPOPolicy, kind: str, size: int) -> None:
    """Another objective and micro-batch for the same rollout."""
    module.objective = objective_of(kind, size)


def objective_of(kind: str, size: int) -> Objective:
    """An objective that stores what its old policy says, so that its first update can be compared with it."""
    settings = {"reference_weight": 0.0} if kind == "nft" else {"updates": 2}
    return OBJECTIVES[kind](micro_batch_size=size, **settings)


def checkpoint_activations(module: GRPOPolicy, on: bool) -> None:
    """Recompute activations in the backward pass, or keep them."""
    transformer = module.model.transformer
    (transformer.enable_gradient_checkpointing if on else transformer.disable_gradient_checkpointing)()


def deviations(
    module: GRPOPolicy, kinds: tuple[str, ...], sizes: tuple[int, ...], metric: str
) -> Iterator[tuple[str, float]]:
    """(what, largest deviation) over objectives, checkpointing and micro-batches, of one rollout."""
    checkpoint_activations(module, False)
    rollout = module.roll_out(PROMPTS)
    for kind, checkpointing, size in product(kinds, (False, True), sizes):
        checkpoint_activations(module, checkpointing)
        use(module, kind, size)
        prepared = module.prepare(rollout, 0)
        metrics = module.accumulate_gradients(rollout, ADVANTAGES, prepared)
        module.model.transformer.zero_grad(set_to_none=True)
        yield f"{kind}{', checkpointing' if checkpointing else ''}, micro-batch {size}", float(metrics[metric])


def first_ratio(bench: Bench) -> Iterator[Row]:
    """The largest |ratio - 1|, of every combination; limit 0. NFT has no ratio: the distance to its old velocity."""
    with tf32(False):
        for (name, dtype), transition, lora in product(DTYPES.items(), (*TRANSITIONS, "ode"), (False, True)):
            if bench.tiny and (name, transition, lora) not in TINY:
                continue
            # Guarded with cps is refused (docs/settings_refused.md).
            kinds = ("nft",) if transition == "ode" else ("clipped", "guarded")[: 1 if transition == "cps" else 2]
            module = made(bench, kinds[0], transition, dtype, lora=lora)
            metric = "ratio_deviation_max"
            if transition == "ode":
                module.old = ShadowWeights(module.model.transformer)  # anew, as dtype and adapter were changed
                metric = "old_deviation"
            worst, where = -1.0, ""
            if bench.tiny:
                kinds = kinds[:1]
            for what, value in deviations(module, kinds, SIZES[1:2] if bench.tiny else SIZES, metric):
                if not value <= worst:  # NaN is the worst of all
                    worst, where = value, what
            yield Row(
                name=f"{name}, {transition}, {'LoRA' if lora else 'all weights'}",
                values={"deviation": worst, "worst_at": where if worst != 0 else "none"},
                limits={"deviation": 0.0},
            )
