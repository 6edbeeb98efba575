"""Where a module says that it computes, inside a run and outside of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from flow_rl.distillation.velocity_gap import EDGES, VelocityGap
from flow_rl.distributed.devices import to_device
from flow_rl.distributed.gradients import finite_everywhere
from flow_rl.flow.guidance import Guidance
from flow_rl.rl.objectives import micro_batches
from flow_rl.rl.reward_metrics import combined, update_means
from lightning_modules.base import TrainedModule

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("status", "expected"), [(TrainerStatus.RUNNING, GPU), (TrainerStatus.FINISHED, "cpu")])
def test_weights_that_rest_on_the_host_compute_on_the_root_device(status: TrainerStatus, expected) -> None:
    module = TrainedModule()  # its weights are on the CPU, as under CPU offload
    assert module.compute_device == torch.device("cpu")
    module._trainer = SimpleNamespace(state=SimpleNamespace(status=status), strategy=SimpleNamespace(root_device=GPU))
    assert module.compute_device == torch.device(expected)


def test_a_copy_to_the_cpu_is_the_tensor_itself() -> None:
    tensor = torch.rand(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


def test_host_and_device_know_the_same_pairs() -> None:
    found = list(micro_batches(3, 2, 4))
    assert [pairs.samples for pairs in found] == [(0, 0, 1, 1), (2, 2)]
    assert [pairs.steps for pairs in found] == [(0, 1, 0, 1), (0, 1)]
    for pairs in found:
        assert pairs.sample.tolist() == list(pairs.samples)
        assert pairs.step.tolist() == list(pairs.steps)
    assert [pairs.sample.device.type for pairs in micro_batches(1, 1, 1, torch.device("meta"))] == ["meta"]


def test_rows_are_guided_where_the_host_would_guide() -> None:
    levels = torch.tensor([1.0, 0.6, 0.60000008, 0.3, 0.2, 0.19999999])
    for guidance in (Guidance(scale=2.0, low=0.6), Guidance(scale=2.0, low=0.2, high=0.6), Guidance(scale=1.0)):
        assert guidance.active_rows(levels).tolist() == [guidance.active(level) for level in levels.tolist()]


def test_levels_fall_into_the_bins_of_a_table() -> None:
    sigma = torch.cat([torch.rand(200), torch.tensor(EDGES)])
    gap = VelocityGap()
    gap.update(torch.ones(len(sigma), 2), torch.ones(len(sigma), 2), sigma)
    expected = torch.bucketize(sigma, torch.tensor(EDGES[1:-1]), right=True).bincount(minlength=len(EDGES) - 1)
    assert gap.count.tolist() == expected.tolist()


def test_metrics_stay_where_they_are_until_they_are_means() -> None:
    def metrics(value: float, device: str = "cpu") -> dict[str, Tensor]:
        return {"loss": torch.tensor(value, device=device), "ratio_max": torch.tensor(value + 1, device=device)}

    whole = combined([(1, metrics(0.0, "meta")), (3, metrics(0.0, "meta"))])
    assert {value.device.type for value in whole.values()} == {"meta"}
    updates = [combined([(1, metrics(1.0)), (3, metrics(2.0))]), metrics(7.0)]
    assert update_means(updates) == {"loss": 5.0, "ratio_max": 5.5}


@pytest.mark.parametrize(
    ("values", "expected"), [((1.0, 2.0), True), ((float("nan"), 1.0), False), ((float("inf"),), False)]
)
def test_one_number_that_is_not_finite_is_enough(values: tuple[float, ...], expected: bool) -> None:
    assert finite_everywhere(*map(torch.tensor, values)) is expected
