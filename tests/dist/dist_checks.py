"""What the ranks do with bare tensors and a small model; each returns what its test looks at."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.processes import GROUP_TIMEOUT
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from flow_rl.models.shard_units import ShardUnit
from strategies.checkpoints import load_shards, save_shards
from flow_rl.distributed.gradients import (any_rank, average_gradients, finite_everywhere, finish_gradients, over_ranks)
from flow_rl.distributed.sharding import (Layout, gathered, reduce_gradients, shard)
from flow_rl.distributed.tensors import (copy_into, full, gathered_tree, like, piece, sharded)


def run_checks(record: str, world_size: int) -> None:
    """Every check, in one process group."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=GROUP_TIMEOUT))
    found = {
        "gradients": gradients(rank),
        "votes": votes(rank),
        "shards": shards(Path(record).parent),
        "training": training(rank),
    }
    torch.save(found, f"{record}.{rank}")
    dist.destroy_process_group()


def gradients(rank: int) -> dict[str, Any]:
    """Means over the ranks; the second weight has a gradient on rank 0 alone, the third on none."""
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    weights[0].grad = torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
    if rank == 0:
        weights[1].grad = torch.ones(3)
    average_gradients(weights)
    means = [None if w.grad is None else w.grad.clone() for w in weights]
    norm = finish_gradients(weights, 1.0)
    return {"means": means, "norm": norm, "clipped": [None if w.grad is None else w.grad for w in weights]}


def votes(rank: int) -> dict[str, Any]:
    numbers = {"loss": float(rank + 1), "ratio_max": float(rank), "some": float("nan") if rank else 4.0}
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    return {
        "any": [any_rank(rank == 1), any_rank(False)],
        "finite": [finite_everywhere(one, one), finite_everywhere(one, nan if rank == 1 else one)],
        "over": over_ranks(numbers),
    }


def shards(directory: Path) -> dict[str, Any]:
    """Sizes that do not divide, on the way through a checkpoint."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    whole = {f"{rows}": torch.arange(rows * 5.0).view(rows, 5) + rows for rows in (1, 3, 4, 7)}
    spread = {name: sharded(piece(tensor, mesh).clone(), tensor.shape, mesh) for name, tensor in whole.items()}
    tree = {"a": [spread["1"], {"b": (spread["3"], 2)}], 5: spread["4"], "seven": spread["7"], "plain": whole["3"]}
    save_shards(tree, directory / "uneven.ckpt", is_first=dist.get_rank() == 0, barrier=dist.barrier)
    back = load_shards(directory / "uneven.ckpt", mesh=mesh)
    target = sharded(torch.zeros_like(piece(whole["7"], mesh)), whole["7"].shape, mesh)
    copy_into(target, whole["7"])
    plain = torch.zeros(7, 5)
    copy_into(plain, back["seven"])
    return {
        "tree": gathered_tree(back, keep=True),
        "whole": whole,
        "layouts": [(t.to_local().shape, spread[n].to_local().shape) for n, t in (("7", back["seven"]), ("4", back[5]))],
        "copied": [full(target), plain, full(like(whole["3"], spread["3"]))],
        "stays_whole": not isinstance(back["plain"], DTensor),
    }


def training(rank: int) -> dict[str, Any]:
    """Three steps of a small model on two micro-batches a rank, in several ways."""
    found: dict[str, Any] = {}
    for name, ways in {
        "plain": {},
        "fused": {"fused": True},
        "late": {"late": True},
        "gathered": {"whole": True},
    }.items():
        found[name] = _train(rank, **ways)
    return found


def _train(rank: int, *, fused: bool = False, late: bool = False, whole: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    layout = Layout(mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    shard(model, [ShardUnit(model, (model[0], model[2]))], layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    data = torch.randn(3, dist.get_world_size(), 2, 4, 5, generator=torch.Generator().manual_seed(1))
    norms, collectives = [], 0
    for step in data:
        optimizer.zero_grad()
        for number, micro_batch in enumerate(step[rank]):
            reduce_gradients(model, now=number == 1 or not late)
            if whole:
                with gathered(model):
                    with CommDebugMode() as counted, torch.no_grad():
                        model(micro_batch)
                        model(micro_batch[:2])
                    collectives += counted.get_total_counts()
                    model(micro_batch).square().mean().div(2).backward()
            else:
                model(micro_batch).square().mean().div(2).backward()
        norms.append(finish_gradients(model.parameters(), 1.0))
        optimizer.step()
    weights = [full(p.detach()).clone() for p in model.parameters()]
    return {"weights": weights, "norms": norms, "collectives": collectives}


def reference(world_size: int) -> dict[str, Any]:
    """The same training in one process on the whole batch, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data = torch.randn(3, world_size, 2, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    norms = []
    for step in data:
        optimizer.zero_grad()
        model(step.flatten(0, 2)).square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    return {"weights": [p.detach() for p in model.parameters()], "norms": norms}
