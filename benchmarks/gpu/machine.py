"""What the machine is, and the most that its device can do: the ceilings that everything else is compared with."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.timing import seconds
from flow_rl.planning.devices import DEVICES

PACKAGES = ("torch", "torchvision", "lightning", "diffusers", "transformers", "peft", "accelerate", "torchmetrics",
            "safetensors", "tokenizers", "triton", "numpy")  # fmt: skip
#: environment variables that change what is measured
VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING",
             "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS")  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    """Versions and the device, for the head of a report."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used",
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gb": properties.total_memory / 1e9,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "peak_tflops": peak_tflops(device),
        }
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def peak_tflops(device: torch.device) -> float | None:
    """The data sheet's dense bfloat16 peak, 10^12 operations a second; None for a device that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_properties(device).name.replace("-", " ")
    fitting = [known for key, known in DEVICES.items() if key.partition("-")[0] in name]
    return fitting[0].tflops if fitting else None


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, float32 products and convolutions on the GPU may round their inputs to TF32, or may not."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def ceilings(bench: Bench) -> Iterator[Row]:
    """Matrix products and copies at sizes that fill the device."""
    size = 256 if bench.tiny else 8192
    for name, dtype, rounded in (
        ("bfloat16", torch.bfloat16, False), ("float32", torch.float32, False), ("float32, TF32", torch.float32, True)
    ):  # fmt: skip
        with tf32(rounded):
            rate = _product_rate(bench, size, dtype)
        values: dict[str, Any] = {"tflops": rate}
        if dtype == torch.bfloat16:
            bench.keep("ceiling", lambda rate=rate: rate)
            peak = peak_tflops(bench.device)
            values["of_peak"] = None if peak is None else rate / peak
        yield Row(name=f"product of {size} x {size}, {name}", values=values)
    yield from _copies(bench)


def _product_rate(bench: Bench, size: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(bench, lambda: left @ right, repeats=20, warm_up=3) / 1e12


def _copies(bench: Bench) -> Iterator[Row]:
    count = 2**20 if bench.tiny else 2**30
    here = torch.empty(count, dtype=torch.uint8, device=bench.device)
    there = torch.empty_like(here)
    yield Row(
        name="copy on the device, read and write",
        values={"gb_per_s": 2 * count / seconds(bench, lambda: there.copy_(here), repeats=10) / 1e9},
    )
    host = torch.empty(count, dtype=torch.uint8, pin_memory=bench.cuda)
    for name, target, source in (("from the host, pinned", here, host), ("to the host, pinned", host, here)):
        taken = seconds(bench, lambda t=target, s=source: t.copy_(s, non_blocking=True), repeats=5)
        yield Row(name=f"copy {name}", values={"gb_per_s": count / taken / 1e9})


def ceiling(bench: Bench) -> float:
    """The rate of bfloat16 products that this device reached, 10^12 operations a second; measured once."""
    return bench.keep("ceiling", lambda: _product_rate(bench, 256 if bench.tiny else 8192, torch.bfloat16))


def rates(bench: Bench, flops: float, taken: float) -> dict[str, float | None]:
    """10^12 operations a second, and their share of the data sheet's peak (MFU) and of the measured ceiling."""
    rate, peak = flops / taken / 1e12, peak_tflops(bench.device)
    return {
        "tflops": rate,
        "mfu": None if peak is None else rate / peak,
        "of_ceiling": rate / ceiling(bench),
    }
