"""TensorFloat-32 is a choice, and one about CUDA alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cli.app import main
from strategies.precision import allow_tf32


@pytest.fixture
def defaults() -> Iterator[None]:
    """Torch's own settings, before and after."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_cuda_may_round_and_a_cpu_computes_as_before(defaults) -> None:
    left, right = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).unbind()
    product, cpu = left @ right, torch.backends.mkldnn.matmul.fp32_precision
    allow_tf32()
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.mkldnn.matmul.fp32_precision == cpu
    assert torch.equal(left @ right, product)


@pytest.mark.parametrize(("arguments", "allowed"), [([], False), (["--run.tf32=true"], True)])
def test_a_run_asks_for_it(defaults, monkeypatch, tmp_path, arguments: list[str], allowed: bool) -> None:
    class Reached(Exception):
        pass

    def stop(*_args: object, **_named: object) -> None:
        raise Reached

    monkeypatch.setattr("cli.app.FlowCLI.instantiate_classes", stop)
    config = ["fit", "--config=configs/demo/t2i_teacher.yaml", f"--run.dir={tmp_path}", *arguments]
    with pytest.raises(Reached):
        main(config)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
