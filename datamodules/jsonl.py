"""JSON Lines files: every row is checked as the file is read, and all faults are named by file, line and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.faults import DataError, Faults
from datamodules.text_lines import read_lines
from flow_rl import strict_json
from flow_rl.names import bad_character, is_blank, why_no_name
from flow_rl.strict_json import RepeatedKeyError
from flow_rl.suggestions import nearest

#: an id keys noise, which takes 64 bits, and groups, which need one of them
LARGEST_ID = 2**62 - 1
#: characters of an id that is a text
LONGEST_ID = 200
#: characters of a field: more is a file pasted into a row
LONGEST_TEXT = 100_000

#: words for the types of fields
_KINDS = {int: "int", float: "float", str: "str", object: "a number or a text"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record.

    Attributes:
        line: in its file, from 1.
        record: fields by name.
    """

    line: int
    record: dict[str, Any]


def read_rows(
    path: str | Path,
    fields: dict[str, type],
    *,
    optional: dict[str, type] | None = None,
    texts: Sequence[str] = (),
    names: Sequence[str] = (),
    check: Callable[[dict], str | None] | None = None,
    faults: Faults | None = None,
) -> list[Row]:
    """Read one object a line, and check it all.

    Args:
        path: the file.
        fields: required keys and their types; float takes integers as well, object takes an integer or a text.
        optional: further keys that may be there.
        texts: fields that must not be blank.
        names: fields that name a category or the like (see `flow_rl.names.why_no_name`).
        check: called with each record; what it returns, if anything, is what is wrong with it.
        faults: takes what is wrong with rows, so that the caller can go on to find more; None raises it here.

    Returns:
        The rows that are right.

    Raises:
        DataError: a file that is missing, empty or no UTF-8 text; and, where `faults` is None, rows that are no JSON
            object, have a missing, unknown, doubled or mistyped key, a text that no tokenizer takes, an `id` that
            occurs twice, or that `check` complains of.
    """
    found, seen = Faults() if faults is None else faults, {}
    known = {**fields, **(optional or {})}
    before, rows = len(found.found), []
    lines = read_lines(path, found)
    _refuse_other_layouts(path, lines, fields)
    for line, text in lines:
        record, complaint = _parse(text)
        complaint = complaint or _fields(record, fields, known) or _contents(record, known, texts, names)
        if not complaint and "id" in fields and seen.setdefault(record["id"], line) != line:
            complaint = f"id {record['id']} was used on line {seen[record['id']]} already; ids must differ."
        if not complaint and check is not None:
            complaint = check(record)
        if complaint:
            found.add(path, line, complaint)
        else:
            rows.append(Row(line=line, record=record))
    if not rows and len(found.found) == before:
        raise DataError([f"'{path}' is empty: expected one JSON object a line with the keys {', '.join(fields)}."])
    if faults is None:
        found.check()
    return rows


def _refuse_other_layouts(path: str | Path, lines: Sequence[tuple[int, str]], fields: Mapping[str, type]) -> None:
    """Refuse one JSON value over many lines, and tables, by one message rather than one a line."""
    first = lines[0][1].strip() if lines else ""
    wanted = f"expected one JSON object a line with the keys {', '.join(fields)}"
    if first.startswith("[") and (len(lines) > 1 or first.startswith("[{")):
        raise DataError([f"{path}: one JSON array; {wanted}. `jq -c '.[]' OLD > NEW` converts it."])
    if first == "{" and len(lines) > 1:
        raise DataError([f"{path}: JSON objects over several lines; {wanted}. `jq -c . OLD > NEW` converts it."])
    columns = {part.strip().strip('"') for separator in ",;\t" for part in first.split(separator)}
    if not first.startswith(("{", "[")) and len(columns & set(fields)) > 1:
        raise DataError([f"{path}: a table with columns such as {first!r:.80}; {wanted}."])


def _parse(text: str) -> tuple[Any, str | None]:
    """The value of a line, and what is wrong with it."""
    try:
        return strict_json.parse(text), None
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg} at column {error.colno})."
    except RepeatedKeyError as error:
        return None, f"{error}."
    except RecursionError:
        return None, "not a record: values are nested too deeply."
    except ValueError as error:  # numbers of thousands of digits, NaN and the like
        return None, f"not JSON ({error})."


def _fields(record: Any, fields: Mapping[str, type], known: Mapping[str, type]) -> str | None:
    """What is wrong with the keys of a record and the types of their values."""
    if not isinstance(record, dict):
        return f"expected an object with the keys {', '.join(fields)}, received {record!r:.80}."
    for key in record:
        if key not in known:
            return f"unknown key {key!a:.80}.{nearest(key, known)}"
    for key in fields:
        if key not in record:
            return f"no '{key}'; expected the keys {', '.join(fields)}."
    for key in [key for key, value in record.items() if value is None and key not in fields]:
        del record[key]  # as good as not written
    for key, value in record.items():
        kind = known[key]
        accepted = (int, float) if kind is float else (int, str) if kind is object else kind
        if not isinstance(value, accepted) or (kind is not str and isinstance(value, bool)):
            return f"'{key}' must be {_KINDS[kind]}, received {value!r:.80}."
    return None


def _contents(
    record: Mapping[str, Any], known: Mapping[str, type], texts: Sequence[str], names: Sequence[str]
) -> str | None:
    """What is wrong with the values of a record."""
    for key, value in record.items():
        if isinstance(value, str):
            if found := bad_character(value):
                return f"'{key}' holds {found}: remove it."
            if len(value) > LONGEST_TEXT:
                return f"'{key}' has {len(value)} characters; at most {LONGEST_TEXT} are taken."
            if key == "id" and (len(value) > LONGEST_ID or is_blank(value)):
                return f"'id' must be a text of 1 to {LONGEST_ID} characters, received {value!r:.80}."
        elif key in ("id", "group") and abs(value) > LARGEST_ID:
            return f"'{key}' must lie between -2^62 and 2^62, received a number of {len(str(abs(value)))} digits."
    for key in texts:
        if key in record and is_blank(record[key]):
            return _blank(key, record)
    for key in names:
        if key in record and (why := why_no_name(record[key])):
            return f"'{key}': {why}"
    return None


def _blank(key: str, record: Mapping[str, Any]) -> str:
    return f"the {key} with id {record['id']} is blank." if "id" in record else f"the {key} is blank."
