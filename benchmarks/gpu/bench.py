"""What checks share: the device, the scale, scratch space, and the records they return."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

Kept = TypeVar("Kept")
Value = float | int | str | bool | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured, unique in its check.
        values: numbers and words by name. None: this device cannot say.
        limits: the largest value that passes, by name. A value without a limit is reported only.
    """

    name: str
    values: Mapping[str, Value]
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def broken(self) -> list[str]:
        """Names of the values that are above their limit, missing or NaN."""
        return [name for name, limit in self.limits.items() if not _within(self.values.get(name), limit)]


def _within(value: Value, limit: float) -> bool:
    return isinstance(value, (int, float)) and value <= limit  # False for NaN as well


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question to the device.

    Attributes:
        name: on the command line and in the report.
        question: what it answers, one line.
        run: yields rows as they are measured, so that an error keeps those before it.
        seconds: how long it is expected to take on an H100; the budget starts nothing that does not fit.
    """

    name: str
    question: str
    run: Callable[[Bench], Iterator[Row]]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where checks run.

    Attributes:
        device: that is measured.
        tiny: the demo base's dimensions and few repetitions, for a CPU.
        directory: scratch space.
        most_seconds: of timing one thing, after its warm-up.
    """

    device: torch.device
    tiny: bool
    directory: Path
    most_seconds: float = 4.0
    _kept: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU of torch's `cuda` kind."""
        return self.device.type == "cuda"

    def keep(self, key: str, make: Callable[[], Kept]) -> Kept:
        """What `make` gives, made once and shared by checks until one of them fails."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def peek(self, key: str) -> Any:
        """What was kept under a key; None if nothing was."""
        return self._kept.get(key)

    def forget(self, *keys: str) -> None:
        """Drop what was kept under these keys (under all, if none are given) and return its memory."""
        for key in keys or tuple(self._kept):
            self._kept.pop(key, None)
        self.clean()

    def clean(self) -> None:
        """Return the device's memory that nothing uses."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int | None:
        """Bytes that tensors hold on the device now; None on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else None

    def capacity(self) -> int | None:
        """Bytes that the device has in all; None on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.cuda else None

    def reset_peak(self) -> None:
        """Begin a new peak of memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> dict[str, float | None]:
        """Peaks since `reset_peak` in GB (10^9 bytes): of tensors, and of what the allocator took for them."""
        if not self.cuda:
            return {"peak_gb": None, "peak_reserved_gb": None}
        return {
            "peak_gb": gb(torch.cuda.max_memory_allocated(self.device)),
            "peak_reserved_gb": gb(torch.cuda.max_memory_reserved(self.device)),
        }

    def row(
        self,
        name: str,
        measure: Callable[[], Mapping[str, Value]],
        limits: Mapping[str, float] | None = None,
    ) -> Row:
        """Measure with peaks of memory; a measurement that runs out of memory says so and the check continues."""
        self.clean()
        self.reset_peak()
        try:
            values = dict(measure())
        except torch.OutOfMemoryError as error:
            values = {"out_of_memory": str(error).splitlines()[0]}
            limits = None
        row = Row(name=name, values=values | self.peaks(), limits=limits or {})
        self.clean()
        return row


def gb(size: float | None) -> float | None:
    """Bytes in 10^9 bytes."""
    return None if size is None else size / 1e9


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over the RMS of what is expected, in float64."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    scale = float(expected.square().mean().sqrt())
    error = float((found - expected).square().mean().sqrt())
    return error / scale if scale > 0 else math.nan
