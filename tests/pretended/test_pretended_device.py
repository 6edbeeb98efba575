"""The pretended device: what it refuses, what it counts, and that nothing of it is left behind."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

from flow_rl.flow.guidance import guide
from tests.pretended.device import pretended_cuda
from tests.pretended.tensor import MixedDevices, PretendedTensor
from tests.pretended.waits import ROOT, WaitRecorder


def test_operation_on_two_devices_names_the_line_of_the_project() -> None:
    with pretended_cuda(), pytest.raises(MixedDevices) as raised:
        guide(torch.ones(2, 3).cuda(), torch.ones(2, 3), 2.0)
    file, line, _ = str(raised.value).split(":", 2)
    assert file == "flow_rl/flow/guidance.py"
    assert "cond - uncond" in (Path(ROOT) / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_values_and_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    expected = layer(x).square().sum()
    expected.backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    parameters = list(layer.parameters())
    with pretended_cuda():
        layer.to("cuda")
        assert all(new is old for new, old in zip(layer.parameters(), parameters, strict=True))
        found = layer(x.cuda()).square().sum()
        assert found.device == torch.device("cuda", 0)
        found.backward()
        assert torch.equal(found.cpu(), expected.detach())
        assert all(torch.equal(p.grad.cpu(), g) for p, g in zip(layer.parameters(), gradients, strict=True))
        layer.cpu()
        assert not any(isinstance(p, PretendedTensor) for p in layer.parameters())


def test_scalars_of_the_cpu_mix_and_indices_do() -> None:
    with pretended_cuda():
        x = torch.arange(4.0, device="cuda")
        assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
        assert x[torch.tensor([1, 3])].tolist() == [1, 3]
        with pytest.raises(MixedDevices):
            x[torch.tensor([1, 3])] = torch.zeros(2)
        with pytest.raises(MixedDevices):
            torch.arange(4.0)[torch.tensor([1], device="cuda")]
        with pytest.raises(MixedDevices):
            x.numpy()


def counted(function) -> dict[str, int]:
    recorder = WaitRecorder()
    with pretended_cuda() as state:
        x = torch.arange(6.0, device="cuda")
        state.on_wait = recorder
        function(x)
    return {wait.kind: count for wait, count in recorder.counts.items()}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: float(x[0]), {"item": 1}),
        (lambda x: bool((x > 2).any()), {"item": 1}),
        (lambda x: x.tolist(), {"tolist": 1}),
        (lambda x: x[x > 2], {"mask": 1}),
        (lambda x: x.masked_fill(x > 2, 0.0), {}),
        (lambda x: (x > 2).nonzero(), {"nonzero": 1}),
        (lambda x: x.cpu(), {"d2h": 1}),
        (lambda x: torch.zeros(3).to(x.device), {"h2d": 1}),
        (lambda x: torch.zeros(3).to(x.device, non_blocking=True), {"h2d": 1}),  # from pageable memory
        (lambda x: torch.zeros(3).pin_memory().to(x.device, non_blocking=True), {}),
        (lambda x: torch.tensor([1, 2], device=x.device), {"h2d": 1}),
        (lambda x: torch.zeros(3, device=x.device), {}),
        (lambda x: x.new_zeros(6).copy_(x), {}),
        (lambda x: x.copy_(torch.zeros(6)), {"h2d": 1}),
        (lambda x: x[torch.tensor([0, 1])], {"index from the CPU": 1}),
        (lambda x: torch.cuda.synchronize(), {"synchronize": 1}),
    ],
)
def test_waits_are_counted(function, expected) -> None:
    assert counted(function) == expected


def test_events_and_streams() -> None:
    with pretended_cuda():
        start, end, stream = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), None
        start.record()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            end.record(stream)
        assert end.query()
        end.synchronize()
        stream.synchronize()
        assert start.elapsed_time(end) >= 0
        with pytest.raises(ValueError, match="recorded"):
            start.elapsed_time(torch.cuda.Event())


def test_bytes_are_counted_once_a_storage() -> None:
    with pretended_cuda(hollow=True) as state:
        x = torch.zeros(1024, 1024, device="cuda")
        kept = x[:10].t()
        assert state.memory.live == torch.cuda.memory_allocated() == 4 * 1024**2
        y = x + 1
        assert state.memory.live == 8 * 1024**2
        del x, y
        assert state.memory.live == 4 * 1024**2  # a view keeps its storage
        del kept
        assert state.memory.live == 0
        assert state.memory.peak == torch.cuda.max_memory_allocated() == 8 * 1024**2


def test_nothing_is_left_behind() -> None:
    watched = (torch.cuda, torch.accelerator, torch.autograd, torch.optim.Optimizer, torch.nn.utils.clip_grad)
    before = [dict(vars(owner)) for owner in (*watched, torch.autocast)]
    with contextlib.suppress(KeyError), pretended_cuda():
        assert torch.cuda.is_available()
        raise KeyError("a test that fails inside")
    assert [dict(vars(owner)) for owner in (*watched, torch.autocast)] == before
    assert not torch.cuda.is_available()
    assert torch.ones(1).to("cpu").device.type == "cpu"
    assert not torch.overrides._get_current_function_mode_stack()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).to("cuda")


def test_libraries_see_that_they_build_an_empty_model() -> None:
    """Transformers initialises rotary tables once: on real memory, if it sees that it is on the meta device before."""
    with pretended_cuda(), torch.device("cuda"), torch.device("meta"):
        assert torch.tensor([]).device.type == "meta"
        assert torch.get_default_device().type == "meta"
        assert torch.empty(2).device.type == "meta"
