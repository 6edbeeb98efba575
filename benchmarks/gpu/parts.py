"""The three parts: which checks, in which order. Imported when asked for, as each needs other libraries."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from benchmarks.gpu.bench import Check


def _checks(module: str) -> Callable[[], list[Check]]:
    return lambda: list(import_module(f"benchmarks.gpu.{module}").CHECKS)


PARTS: dict[str, Callable[[], list[Check]]] = {
    "A": _checks("numerics"),
    "B": _checks("real_size"),
    "C": _checks("iterations"),
}
