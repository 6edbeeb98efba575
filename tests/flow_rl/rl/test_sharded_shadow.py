"""Shadow weights on DTensors: elementwise on the local shards, nothing gathered."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from flow_rl.monitoring.update_direction import stepped
from flow_rl.rl.shadow_weights import ShadowWeights


@pytest.fixture
def layers(tmp_path) -> Iterator[tuple[torch.nn.Linear, torch.nn.Linear]]:
    """A plain layer and one with the same weights, sharded over a mesh of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = torch.nn.Linear(4, 6)
        sharded = copy.deepcopy(plain)
        for name, parameter in list(sharded.named_parameters()):
            setattr(sharded, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        yield plain, sharded
    finally:
        dist.destroy_process_group()


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def test_shards_follow_the_plain_weights_without_communication(layers) -> None:
    plain, sharded = layers
    shadows = ShadowWeights(plain), ShadowWeights(sharded)
    with CommDebugMode() as communication:
        for layer, shadow in zip(layers, shadows, strict=True):
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.mul_(3.0)
            shadow.blend(0.75)
            shadow.blend(0.75)
            shadow.swap()
    assert communication.get_total_counts() == 0
    assert all(isinstance(value, DTensor) for value in shadows[1].state_dict().values())
    for one, other in ((plain, sharded), shadows):
        one, other = whole(one.state_dict()), whole(other.state_dict())
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_state_of_shards_is_restored(layers) -> None:
    _, sharded = layers
    shadow = ShadowWeights(sharded)
    state = {name: value.clone() for name, value in shadow.state_dict().items()}
    with torch.no_grad():
        sharded.weight.mul_(2.0)
    shadow.blend(0.0)
    shadow.load_state_dict(state)
    assert torch.equal(whole(shadow.state_dict())["weight"], whole(state)["weight"])


def test_a_probe_steps_shards_by_the_length_of_the_whole(layers) -> None:
    plain, sharded = layers
    mesh = sharded.weight.device_mesh
    for name, parameter in plain.named_parameters():
        parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
        getattr(sharded, name).grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
    start = whole(dict(sharded.named_parameters()))["weight"].clone()
    with stepped(plain.parameters(), 0.5), stepped(sharded.parameters(), 0.5):
        torch.testing.assert_close(sharded.weight.full_tensor(), plain.weight)
        assert not torch.equal(plain.weight, start)
    assert torch.equal(sharded.weight.full_tensor(), start)
