"""What a misspelt name may have meant. Imports nothing of the project, so that every room can use it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest of the names, whatever its case, or nothing."""
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(lower), 1)
    return f" Did you mean '{lower[close[0]]}'?" if close else ""
