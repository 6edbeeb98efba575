"""Arrays that take time to make, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from flow_rl.files import replacing_file


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
        with replacing_file(path) as partial, partial.open("wb") as file:  # a name would get another suffix
            np.savez(file, **made)
    return made
