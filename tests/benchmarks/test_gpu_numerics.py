"""Part A of the battery as tests: the device computes what the CPU does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.bench import Bench, Check
from benchmarks.gpu.numerics import CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_numerics(check: Check, tmp_path: Path) -> None:
    bench = Bench(device=torch.device("cuda", 0), tiny=False, directory=tmp_path)
    rows = list(check.run(bench))
    assert rows
    assert {row.name: row.values for row in rows if row.broken} == {}
