"""The committed table of host waits, and how a run compares with it.

The project's own waits are told by kind, file and function, so that edits elsewhere in a file change nothing, and must
be met exactly. Those inside libraries are one number a phase, and may fall.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.pretended.waits import Wait

TABLE = Path(__file__).with_name("host_waits.json")
#: set to 1, the tests write the table instead of comparing with it
WRITE = "WRITE_HOST_WAITS"
COMMAND = f"{WRITE}=1 .venv/bin/python -m pytest tests/pretended/test_every_stage.py"
OUTSIDE = "outside of any phase"
#: by phase: `libraries`, a number; `project`, numbers by wait
Row = Mapping[str, Mapping[str, Any]]


def row_of(counts: Counter[Wait]) -> dict[str, dict[str, Any]]:
    """A case's row of the table."""
    row: dict[str, dict[str, Any]] = {}
    for wait, count in counts.items():
        phase = row.setdefault(wait.phase or OUTSIDE, {"libraries": 0, "project": Counter()})
        if wait.place.library or not wait.place.file:
            phase["libraries"] += count
        else:
            phase["project"][_name(wait)] += count
    return {phase: {"libraries": v["libraries"], "project": dict(v["project"])} for phase, v in row.items()}


def _name(wait: Wait) -> str:
    return f"{wait.kind}: {wait.place.file} {wait.place.function}"


def read() -> dict[str, Row]:
    """The committed table, a row a case."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def write(rows: Mapping[str, Row]) -> None:
    """Replace the committed table."""
    TABLE.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def differences(counts: Counter[Wait], allowed: Row) -> list[str]:
    """What a run does otherwise than the table says, a line each; waits that are new name their lines."""
    lines: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for wait, count in counts.items():
        inside = bool(wait.place.library) or not wait.place.file
        lines[wait.phase or OUTSIDE, "libraries" if inside else _name(wait)][str(wait.place)] += count
    found, told = row_of(counts), []
    for phase in sorted(found.keys() | allowed.keys()):
        now, then = (row.get(phase, {"libraries": 0, "project": {}}) for row in (found, allowed))
        pairs = [("libraries", max(now["libraries"], then["libraries"]), then["libraries"])]
        names = sorted(now["project"].keys() | then["project"].keys())
        pairs += [(name, now["project"].get(name, 0), then["project"].get(name, 0)) for name in names]
        for name, count, expected in pairs:
            if count != expected:
                where = ", ".join(f"{place} ({n})" for place, n in lines[phase, name].most_common(5))
                told.append(f"{phase}: {name}: {count} waits, {expected} in the table. Now at: {where or 'nowhere'}")
    return told
