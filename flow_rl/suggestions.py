"""What a misspelt name may have meant. Imports nothing of the project, so that every room can use it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest of the names, whatever its case, or nothing."""
    found = _closest(name, names)
    return f" Did you mean '{found}'?" if found else ""


def nearest_path(path: Path) -> str:
    """`nearest` for a path that does not exist, among the names in its directory: what they share says nothing."""
    found = _closest(path.name, (p.name for p in path.parent.glob("*")))
    return f" Did you mean '{path.parent / found}'?" if found else ""


def _closest(name: str, names: Iterable[str]) -> str | None:
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(lower), 1)
    return lower[close[0]] if close else None
