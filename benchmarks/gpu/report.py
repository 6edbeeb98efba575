"""The record of a part: a JSON file that is complete after every measurement, and Markdown tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Row, Value


class Report:
    """What a part has found so far; every change is on disk at once.

    Args:
        directory: gets `part_<part>.json` and `part_<part>.md`.
        part: its letter.
        header: what was asked and of which machine.
    """

    def __init__(self, directory: Path, part: str, header: Mapping[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown = directory / f"part_{part}.json", directory / f"part_{part}.md"
        self.checks: list[dict[str, Any]] = []
        self._content: dict[str, Any] = {"part": part, **header, "complete": False, "checks": self.checks}
        self.write()

    def start(self, name: str, question: str) -> dict[str, Any]:
        """A new check's record, which counts as killed until it says otherwise."""
        record: dict[str, Any] = {"name": name, "question": question, "status": "killed", "rows": []}
        self.checks.append(record)
        self.write()
        return record

    def add(self, record: dict[str, Any], row: Row) -> None:
        """One more row of a check."""
        entry: dict[str, Any] = {"name": row.name, "values": dict(row.values)}
        if row.limits:
            entry |= {"limits": dict(row.limits), "broken": row.broken}
        record["rows"].append(entry)
        self.write()

    def end(self, seconds: float) -> None:
        """The part is over."""
        self._content |= {"complete": True, "seconds": seconds}
        self.write()

    def write(self) -> None:
        """Replace both files, each in one step: whoever kills the process finds whole ones."""
        text = json.dumps(_finite(self._content), indent=1, ensure_ascii=False)
        for path, content in ((self.json, text), (self.markdown, self.tables())):
            waiting = path.with_name(path.name + ".tmp")
            waiting.write_text(content + "\n", encoding="utf-8")
            os.replace(waiting, path)

    def tables(self) -> str:
        """Every check as a Markdown table."""
        lines = [f"# Part {self._content['part']}"]
        for record in self.checks:
            lines += ["", f"## {record['name']}: {record['status']}", record["question"], ""]
            lines += table(record["rows"])
            lines += [record[key] for key in ("reason",) if key in record]
        return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table, a column for every value that any row has; broken limits are marked."""
    columns = list(dict.fromkeys(name for row in rows for name in row["values"]))
    if not columns:
        return []
    lines = [f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for row in rows:
        cells = []
        for name in columns:
            cell = _cell(row["values"].get(name))
            broken = name in row.get("broken", ())
            cells.append(f"**{cell}** (limit {row['limits'][name]:g})" if broken else cell)
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
