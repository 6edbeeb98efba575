"""JSON Lines files, with errors that name file, line and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flow_rl.suggestions import nearest, nearest_path


def read_records(
    path: str | Path,
    fields: dict[str, type],
    *,
    optional: dict[str, type] | None = None,
    check: Callable[[dict], str | None] | None = None,
) -> list[dict]:
    """Read one object a line.

    Args:
        path: the file.
        fields: required keys and their types; float takes integers as well, object takes anything.
        optional: further keys that may be there.
        check: called with each record; what it returns, if anything, is what is wrong with it.

    Raises:
        ValueError: a missing or empty file, a line that is not an object, a missing, unknown or mistyped key, or an
            `id` that occurs twice, or a record that `check` complains of; the message says which line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"No file '{path}'.{nearest_path(path)}")
    records, seen = [], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        record = _check(_parse(line, path, number), fields, optional or {}, f"{path}, line {number}")
        if check is not None and (complaint := check(record)):
            raise ValueError(f"{path}, line {number}: {complaint}")
        if "id" in fields and seen.setdefault(record["id"], number) != number:
            raise ValueError(f"{path}, line {number}: id {record['id']} was used on line {seen[record['id']]} already.")
        records.append(record)
    if not records:
        raise ValueError(f"'{path}' is empty: expected one JSON object a line with the keys {', '.join(fields)}.")
    return records


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}).") from None


def _check(record: Any, fields: dict[str, type], optional: dict[str, type], where: str) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with the keys {', '.join(fields)}, received {record!r:.80}.")
    for key in record.keys() - fields.keys() - optional.keys():
        raise ValueError(f"{where}: unknown key '{key}'.{nearest(key, [*fields, *optional])}")
    for key in fields:
        if key not in record:
            raise ValueError(f"{where}: no '{key}'; expected the keys {', '.join(fields)}.")
    for key, value in record.items():
        kind = fields.get(key) or optional[key]
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind in (int, float) and isinstance(value, bool)):
            raise ValueError(f"{where}: '{key}' must be {kind.__name__}, received {value!r:.80}.")
    return record
