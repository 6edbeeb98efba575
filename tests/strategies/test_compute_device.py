"""Under `cpu_offload` weights rest in CPU memory, and everything else says and has the device that computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from lightning import LightningModule
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric
from typing_extensions import override

from flow_rl.distributed.sharding import Layout, shard
from flow_rl.models import load_image_model
from strategies import FSDP2Strategy

#: stands for a GPU: another device than the shards'
ELSEWHERE = torch.device("meta")


class Elsewhere(FSDP2Strategy):
    @property
    @override
    def root_device(self) -> torch.device:
        return ELSEWHERE


@pytest.fixture
def layout(tmp_path) -> Iterator[Layout]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield Layout(mesh=init_device_mesh("cpu", (1,)), cpu_offload=True)
    finally:
        dist.destroy_process_group()


def test_everything_but_the_shards_is_where_it_computes(layout, tiny_path) -> None:
    module = LightningModule()
    module.model = load_image_model(tiny_path, image_size=(32, 32))
    module.model.vae.to_empty(device=ELSEWHERE)  # torch points no CPU tensor at this device, as it would at a GPU
    module.metric = MeanMetric()
    shard(module.model, module.model.shard_units(), layout)
    strategy = Elsewhere(cpu_offload=True)
    strategy._model = module
    strategy.model_to_device()
    shards = [p for p in module.parameters() if isinstance(p, DTensor)]
    assert shards
    assert all(p.to_local().device.type == "cpu" for p in shards)
    assert module.device == module.metric.device == module.model.device == ELSEWHERE
    assert all(buffer.device == ELSEWHERE for buffer in module.buffers())
