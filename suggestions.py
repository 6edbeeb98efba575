"""What a misspelt name may have meant. Imports nothing of the project, so that every room can use it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest of the names, whatever its case, or nothing."""
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(lower), 1)
    return f" Did you mean '{lower[close[0]]}'?" if close else ""


def nearest_path(path: Path) -> str:
    """`nearest` for a path that does not exist, among what its directory holds."""
    if not path.parent.is_dir():
        return ""
    return nearest(str(path), (str(p) for p in path.parent.glob("*")))
