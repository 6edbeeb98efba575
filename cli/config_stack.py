"""Several `--config` files: a stage first, then what changes it. Here is refused what one would silently undo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import lightning_modules
from flow_rl.errors import SettingError

#: what adds to a list in place of replacing it, in jsonargparse's YAML
ADDS = "callbacks+"


def check_stack(args: Sequence[str]) -> None:
    """Look at the files of a command line together. Each by itself is the parser's business, a bad one as well.

    Args:
        args: the command line.

    Raises:
        SettingError: files of two stages, or callbacks that are added before the list they would be added to.
    """
    read = [(path, _content(path)) for path in config_files(args)]
    for number, (path, content) in enumerate(read):
        for before, earlier in read[:number]:
            _same_stage((before, _stage(earlier)), (path, _stage(content)))
            if ADDS in _section(earlier, "trainer") and "callbacks" in _section(content, "trainer"):
                raise SettingError(
                    f"{path} has a list of callbacks of its own and would drop those that {before} adds. Give the "
                    f"configuration of the stage first: --config {path} --config {before}."
                )


def config_files(args: Sequence[str]) -> Iterator[str]:
    """The files of `--config FILE` and `--config=FILE`, in order."""
    for number, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            yield value if equals else "".join(args[number + 1 : number + 2])


def _same_stage(before: tuple[str, str | None], after: tuple[str, str | None]) -> None:
    (first, stage), (second, other) = before, after
    if stage is not None and other is not None and stage != other:
        raise SettingError(
            f"{first} is of a {stage} and {second} of a {other}, which would replace it with all its settings. A run "
            "has one stage: leave one of them out; a file that changes settings of any stage names no model.class_path."
        )


def _content(path: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _stage(content: Mapping[str, Any]) -> str | None:
    """The project's stage that a file names, if any: a user's own class may well be a variant of what it replaces."""
    module, _, name = str(_section(content, "model").get("class_path")).rpartition(".")
    return name if module == "lightning_modules" and name in lightning_modules.__all__ else None
