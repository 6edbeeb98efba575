"""Memory of one rank, item by item, in bytes.

Weights, gradients and optimizer states are exact; activations come from the probe; the VAE's decoder is a rough figure.
Not counted: the driver's context, fragmentation, and rewards other than vision-language models that run in the process.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from doctor.probe import ForwardCost, Load, forward_cost
from doctor.setup import Setup
from doctor.weights import Components, count, optimizer_bytes, trained
from doctor.workload import Workload
from models.vae import VAE_PIXELS

FLOAT = 4
#: what the VAE's decoder holds at once, in feature maps of full resolution; counted on Qwen-Image 2.1's
VAE_FEATURE_MAPS = 11


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing in memory.

    Attributes:
        name: of the item.
        size: bytes on one rank's device.
        phase: `always`, or the phase it exists in: `rollout` or `update`.
        host: bytes on the host instead, where it is offloaded.
    """

    name: str
    size: int
    phase: str = "always"
    host: int = 0


def peak(items: list[Item]) -> int:
    """Bytes at the fuller of the two phases."""
    always = sum(item.size for item in items if item.phase == "always")
    return always + max(sum(i.size for i in items if i.phase == phase) for phase in ("rollout", "update"))


def memory_items(
    setup: Setup, parts: Components, work: Workload, update: ForwardCost, rollout: ForwardCost
) -> list[Item]:
    """Every item of a GRPO or distillation run.

    Args:
        setup: the run.
        parts: its model on the meta device.
        work: its workload.
        update: cost of a micro-batch's forward with gradient.
        rollout: cost of the rollout's batch.
    """
    model, shards, host = setup.model, setup.shards, setup.offload
    trains = trained(parts.transformer)
    values = count(trains)
    frozen = 2 if getattr(model, "frozen_dtype", "float32") == "bfloat16" else FLOAT
    weights = values * FLOAT + (count(parts.transformer.parameters()) - values) * frozen
    states = optimizer_bytes(model.make_optimizer).total(trains)

    def shared(name: str, size: int) -> Item:
        share = math.ceil(size / shards)
        return Item(name=name, size=0 if host else share, host=share if host else 0)

    items = [
        shared("transformer", weights),
        shared("gradients", values * FLOAT),
        shared("optimizer states", states),
        *(shared(name, values * FLOAT) for name in _copies(setup)),
        *_teachers(model, parts, shards),
        shared("text encoder", count(parts.text_encoder.parameters()) * frozen),
        Item(name="VAE", size=count(parts.vae.parameters()) * FLOAT),
        *_local_rewards(model),
        Item(name="activations", size=update.activations(checkpointing=setup.checkpointing), phase="update"),
        Item(name="prefix keys and values", size=prefix_bytes(parts.transformer, work, setup), phase="rollout"),
        Item(name="one block's tensors in the rollout", size=rollout.block.saved, phase="rollout"),
        Item(name="VAE decoder (rough)", size=decoder_bytes(model.image_size, parts.vae), phase="rollout"),
    ]
    if shards > 1:  # rollouts, teachers and updates gather the transformer once each, one after the other
        width = setup.compute_dtype.itemsize
        embedding = count(parts.text_encoder.get_input_embeddings().parameters())
        items += [
            Item(name="gathered transformer", size=count(parts.transformer.parameters()) * width),
            Item(name="text encoder's gathered embedding", size=embedding * width),
        ]
    return [item for item in items if item.size or item.host]


def load_of(work: Workload, *, rollout: bool) -> Load:
    """What one forward is given, in a rollout or in an update."""
    samples = work.rollout_batch if rollout else min(work.micro_batch, math.ceil(work.pairs / work.ranks))
    prompts = max(1, samples // work.group_size) if rollout else work.prompts_a_micro_batch
    return Load(samples=samples, prompts=min(prompts, samples), text=work.text, source=work.source, target=work.target)


def forward_costs(setup: Setup, parts: Components, work: Workload) -> tuple[ForwardCost, ForwardCost]:
    """Costs of a micro-batch's forward and of the rollout's, in the dtype that blocks compute in."""
    update, rollout = (_cost(parts.transformer, load_of(work, rollout=r), setup.compute_dtype) for r in (False, True))
    return update, rollout


@functools.lru_cache(maxsize=256)
def _cost(transformer: torch.nn.Module, load: Load, dtype: torch.dtype) -> ForwardCost:
    """Adapters keep their dtype. Kept, as a proposal asks for the same loads again and again."""
    probed = (transformer.transformer_blocks[0], *(m for n, m in transformer.named_children() if "blocks" not in n))
    held = [p for module in probed for n, p in module.named_parameters() if ".lora_" not in n]
    own = [p.dtype for p in held]
    for parameter in held:
        parameter.data = parameter.data.to(dtype)
    cost = forward_cost(transformer, load, dtype)
    for parameter, before in zip(held, own, strict=True):
        parameter.data = parameter.data.to(before)
    return cost


def prefix_bytes(transformer: torch.nn.Module, work: Workload, setup: Setup) -> int:
    """Keys and values of text and source that a rollout keeps: one copy a prompt, of both branches."""
    if not getattr(transformer.config, "causal_condition", False):
        return 0
    a_token = 2 * transformer.inner_dim * len(transformer.transformer_blocks) * setup.compute_dtype.itemsize
    load = load_of(work, rollout=True)
    branches = 2 if any("unconditional" in phase.name for phase in work.phases) else 1
    return load.prompts * (load.text + load.source) * a_token * branches


def decoder_bytes(image_size: int, vae: torch.nn.Module) -> int:
    """A rough figure: feature maps at full resolution of as many images as the VAE takes at a time."""
    channels = vae.config.get("decoder_base_dim") or vae.config["base_dim"]
    images = max(1, VAE_PIXELS // image_size**2)
    return VAE_FEATURE_MAPS * images * image_size**2 * channels * FLOAT


def _copies(setup: Setup) -> list[str]:
    """Copies of the trained weights, by name."""
    from lightning_modules.objectives import OBJECTIVES

    names = ["average (EMA)"] if setup.ema else []
    if hasattr(setup.model, "rollout_settings"):
        settings = setup.model.objective_settings
        objective = OBJECTIVES[settings.kind](setup.model.rollout_settings, settings)
        names += ["old policy"] * objective.uses_old_policy + ["reference"] * objective.uses_reference
    return names


def _teachers(model: Any, parts: Components, shards: int) -> list[Item]:
    """Room for one teacher on the device, and all of them on the host."""
    teachers = getattr(model, "teachers", None) or {}
    paths = {teacher.path or model.model_path for teacher in teachers.values()}
    if paths and model.lora is not None:
        paths -= {model.start_path}  # the student's own transformer plays the teachers over the same weights
    if not paths:
        return []
    values = sum(p.numel() for n, p in parts.transformer.named_parameters() if ".lora_" not in n)
    a_value = 2 if model.frozen_dtype == "bfloat16" else FLOAT
    size = math.ceil(values * a_value / (shards if model.shard_teachers else 1))
    return [Item(name="teacher in turn", size=size, host=size * len(paths))]


def _local_rewards(model: Any) -> list[Item]:
    """Vision-language rewards that run in the process, one item a checkpoint."""
    found = {}
    for reward in {**getattr(model, "rewards", {}), **(getattr(model, "monitors", None) or {})}.values():
        if (size := getattr(reward, "planned_bytes", None)) is not None:
            found[reward.path] = Item(name=f"reward model {reward.path}", size=size)
    return list(found.values())
