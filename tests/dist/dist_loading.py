"""Loading in shards: what two ranks hold while and after they load, against a model loaded whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tests.peak_memory import PeakMemory
from tests.processes import GROUP_TIMEOUT
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from flow_rl.models import (ImageModel, load_image_model)
from flow_rl.models.adapters import add_lora
from flow_rl.models.memory import WeightDtypes
from flow_rl.models.shard_units import (ShardUnit, vlm_unit)
from flow_rl.models.stored import WeightReader
from flow_rl.models.vision_language import (load_empty_vlm, load_vlm)
from flow_rl.distributed.loading import (fill, in_units)
from flow_rl.distributed.sharding import (Layout, shard)
from flow_rl.distributed.tensors import full

TEXTS = ("a red pot", "a tulip in a blue pot, yellow background")


def run_loading(record: str, world_size: int, generators: dict[str, str], vlm: str) -> None:
    """Every model, in one process group."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=GROUP_TIMEOUT))
    layout = Layout(mesh=init_device_mesh("cpu", (world_size,)))
    found = {name: _generator(path, layout, adapter=False) for name, path in generators.items()}
    found |= {f"{name}, adapter": _generator(path, layout, adapter=True) for name, path in generators.items()}
    found["reward model"] = _reward_model(vlm, layout)
    path = next(iter(generators.values()))
    found["refused"] = {name: _refused(path, layout, name) for name in ("unheard_of", "proj_out.weight")}
    torch.save(found, f"{record}.{rank}")
    dist.destroy_process_group()


def _prepared(path: str, *, adapter: bool, empty: bool) -> ImageModel:
    """As a module's `configure_model` does."""
    dtypes = WeightDtypes.kept("bfloat16" if adapter else "float32", adapter=adapter)
    model = load_image_model(path, image_size=(32, 32), dtypes=dtypes, empty=empty)
    if adapter:
        torch.manual_seed(3)
        add_lora(model.transformer, rank=2, alpha=4, dropout=0.0, targets=model.lora_targets)
    return model


def _generator(path: str, layout: Layout, *, adapter: bool) -> dict[str, Any]:
    model = _prepared(path, adapter=adapter, empty=True)
    units = model.shard_units()
    peak = _load(model, units, layout, model.stored)
    whole = _prepared(path, adapter=adapter, empty=False)
    found = _compared(model, whole, units) | {"peak": peak}
    with torch.no_grad():
        outputs = [_outputs(m) for m in (model, whole)]
    return found | {"same outputs": all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))}


def _load(model: nn.Module, units: Sequence[ShardUnit], layout: Layout, reader: WeightReader) -> int:
    """Shard and fill; the most bytes that parameters and what is on its way to them held."""
    inside = [p for unit in units for p in unit.root.parameters()]
    there = sum(p.numel() * p.element_size() for p in inside if not p.is_meta)  # adapters alone
    with PeakMemory() as memory:
        shard(model, units, layout)
        fill(in_units(model, units), reader)
    return there + memory.peak


def _outputs(model: ImageModel) -> list[Tensor]:
    conditioning = model.encode(TEXTS)
    latents = torch.randn(2, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    return [*conditioning.embeds, model.velocity(latents, torch.tensor([0.9, 0.3]), conditioning)]


def _reward_model(path: str, layout: Layout) -> dict[str, Any]:
    model, _, reader = load_empty_vlm(path)
    units = (vlm_unit(model),)
    peak = _load(model, units, layout, reader)
    whole, _ = load_vlm(path)
    return _compared(model, whole, units) | {"peak": peak, "same outputs": True}


def _compared(model: nn.Module, whole: nn.Module, units: tuple) -> dict[str, Any]:
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    differing = [n for n, t in expected.items() if n not in found or not _equal(found[n], t)]
    inside = {id(p): p for unit in units for p in unit.root.parameters()}.values()
    return {
        "differing": differing + sorted(found.keys() - expected.keys()),
        "buffers": len(dict(whole.named_buffers())),
        "requires": [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in whole.parameters()],
        "held": sum(p.to_local().nbytes for p in inside),
        "whole": sum(p.numel() * p.element_size() for p in inside),
        "largest": max(p.numel() * p.element_size() for p in inside),
    }


def _equal(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(full(found.detach()), expected.detach())


def _refused(path: str, layout: Layout, name: str) -> str:
    """A tensor that no file has, or not in this shape, which the first rank alone can see."""
    model = load_image_model(path, image_size=(32, 32), empty=True)
    parent, _, own = name.rpartition(".")
    strange = nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False)
    model.transformer.get_submodule(parent).register_parameter(own, strange)
    units = model.shard_units()
    shard(model, units, layout)
    try:
        fill(in_units(model, units), model.stored)
    except ValueError as error:
        return str(error)
    return ""
