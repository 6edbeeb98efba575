"""Prompt files made up for a plan whose data are not there yet."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from PIL import Image

from datamodules import EditPairDataModule, PromptDataModule
from datamodules.jsonl import read_rows


def stand_in_for_data(config: Any, directory: Path, where: str = "data") -> list[str]:
    """Point settings of prompt files that are missing at files made up for the plan, which takes nothing from them.

    Args:
        config: of a datamodule, or of one that holds others; changed in place.
        directory: where the files are written.
        where: name of the datamodule's settings.

    Returns:
        A sentence on each missing file.
    """
    found = []
    arguments = (config or {}).get("init_args") or {}
    kind = _class(config) if arguments else None
    for name, value in list(vars(arguments).items() if isinstance(arguments, Namespace) else arguments.items()):
        if isinstance(value, (Namespace, dict)) and "class_path" in value:
            found += stand_in_for_data(value, directory, f"{where}.{name}")
        elif isinstance(value, str) and name.endswith("_file") and issubclass(kind, PromptDataModule):
            if Path(value).is_file():
                continue
            found.append(f"{where}.{name}: {_complaint(value)}")
            arguments[name] = str(_made_up(kind, arguments.get("prompts_per_step") or 1, directory))
    return found


def _class(config: Any) -> type:
    module, _, name = config["class_path"].rpartition(".")
    return getattr(import_module(module), name)


def _complaint(path: str) -> str:
    try:
        read_rows(path, {})
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{path} is there")


def _made_up(kind: type, rows: int, directory: Path) -> Path:
    """A new file of so many prompts or edits, with ids that no other one has."""
    number = len(list(directory.iterdir()))
    source = directory / "source.png"
    Image.new("RGB", (8, 8)).save(source)
    edits = issubclass(kind, EditPairDataModule)
    path, lines = directory / f"{number}.jsonl", []
    for row in range(number * rows, (number + 1) * rows):
        # No two rows are alike, so that no file looks held out in vain.
        text = {"instruction": f"x {row}", "source": source.name} if edits else {"prompt": f"x {row}"}
        lines.append(json.dumps({"id": row, "category": "x"} | text))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
