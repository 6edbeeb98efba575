"""What the doctor does with data: lists all their faults, or makes up files for a plan whose data are not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from PIL import Image

from cli.data_checks import prompts_fit_generator
from cli.doctor_setup import setup_of
from datamodules import AnnotationDataModule, EditPairDataModule, PromptDataModule
from datamodules.faults import DataError, listed
from datamodules.jsonl import read_rows
from datamodules.prompts import TaskDataModule
from flow_rl.errors import SettingError, refuse

#: faults that `doctor --data` lists
MOST_FAULTS = 200


def examine_data(make_cli: Callable[[type, list[str]], Any], cli: type, args: list[str]) -> None:
    """Look at the data of a run and print what they are.

    Args:
        make_cli: builds a CLI of a class for a command line.
        cli: builds module and data and stops there.
        args: subcommand, configs and overrides.

    Raises:
        SettingError: with all faults of all files, up to a limit; the rest is counted.
    """
    try:
        built = make_cli(cli, args)
    except SettingError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__
        if isinstance(cause, DataError):
            raise SettingError(listed(cause.faults, MOST_FAULTS)) from None
        raise
    setup = setup_of(built, args[0])
    refuse(list(prompts_fit_generator(setup)))
    print("\n".join([*_described(built.datamodule), "The data are sound."]))


def _described(data: Any) -> Iterator[str]:
    if isinstance(data, TaskDataModule):
        for part in data.by_task().values():
            for name, split in part.splits.items():
                table, longest = getattr(part, name), max(split.texts.values(), key=len)
                yield (
                    f"{split.setting} '{split.path}' ({part.task}): {len(table)} of {len(split.lines)} rows in use, "
                    f"{len(set(table.categories))} categories, the longest prompt has {len(longest)} characters."
                )
    elif isinstance(data, AnnotationDataModule):
        for name in ("train", "validation", "test"):
            yield f"data.{name}_files: {len(getattr(data, name))} images in use."
        yield f"Dimensions: {', '.join(data.dimensions)}."


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
