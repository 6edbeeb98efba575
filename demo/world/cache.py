"""Arrays that take time to make, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def cached_arrays(path: Path | None, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` returns, or what it returned when the file was written.

    Args:
        path: an .npz file whose name stands for everything that the arrays depend on; None keeps nothing.
        make: makes the arrays, by name.
    """
    if path is not None and path.exists():
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    made = dict(make())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(partial, **made)
        partial.replace(path)  # a reader never sees half a file
    return made
