"""Several `--config` files: a stage first, then what changes it. A file may include others, which come before it.

`include: ../shared/stage.yaml` (or a list) means no more than `--config` of those files before the file itself. Paths
are relative to the file. Here is also refused what one file would silently undo of another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning_modules
from flow_rl.errors import SettingError
from flow_rl.strict_yaml import Written, keys_of, load, read_text, values
from flow_rl.suggestions import nearest_path

#: the key of a file that names what comes before it; no setting, so it's in no resolved or saved config
INCLUDE = "include"


def expand(args: Sequence[str]) -> list[str]:
    """Put every included file on the command line, and look at all files together.

    A file that isn't there or holds no mapping is the parser's business.

    Args:
        args: the command line.

    Returns:
        The command line, with `--config=FILE` of each included file before the file that includes it.

    Raises:
        SettingError: a file that is no YAML or says something twice, an included file that isn't there or includes
            itself, a file that comes twice, or files of two stages.
    """
    expanded, files, rest = [], [], iter(args)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-c"):
            expanded.append(argument)
            continue
        given = value if equals else next(rest, None)
        if given is None:
            expanded.append(argument)
            break
        found = list(_with_included(given))
        files += [(path, given) for path in found]
        expanded += [f"--config={path}" for path in found]
    _refuse_two_stages(files)
    _refuse_repeated(files)
    return expanded


def content_of(path: str) -> dict[str, Any]:
    """What a file holds; nothing for one that isn't there or holds no mapping, which the parser refuses.

    Raises:
        SettingError: no YAML, or equal keys in a mapping.
    """
    if not Path(path).is_file():
        return {}
    content = load(path)
    return content if isinstance(content, dict) else {}


def settings_only(tree: Any, callbacks: Sequence[str]) -> Any:
    """A file's content as the parser takes it: without `include`, and `callbacks: null` as a null for every name.

    Args:
        tree: as `flow_rl.strict_yaml.parse` gives it.
        callbacks: names of all callbacks of the stack.
    """
    if not isinstance(tree, dict):
        return tree
    settings = {key: value for key, value in tree.items() if key != INCLUDE}
    if "callbacks" in settings and values(settings["callbacks"]) is None:
        del settings["callbacks"]
        settings |= {"callbacks": dict.fromkeys(callbacks)} if callbacks else {}
    return settings


def _refuse_settings_twice(path: str) -> None:
    """A setting may be written in two ways in one file, as a key with dots and inside of a mapping."""
    seen: dict[tuple[str, ...], Written] = {}
    for key in keys_of(read_text(path), path):
        # init_args may be left out, and a "+" adds to a list, which several lines may do
        place = tuple(part for part in ".".join(key.path).split(".") if part != "init_args")
        before = seen.setdefault(place, key)
        if before.path != key.path and (before.leaf or key.leaf):
            raise SettingError(
                f"{path}:{key.line}: {'.'.join(place)} is set here and on line {before.line}. Leave one of the two out."
            )


def _with_included(path: str, including: tuple[str, ...] = ()) -> Iterator[str]:
    """A file after those that it includes, at any depth."""
    if path in including:
        raise SettingError(f"{' includes '.join((*including, path))}: a file can't come before itself.")
    content = content_of(path)
    if content:
        _refuse_settings_twice(path)
    named = content.get(INCLUDE) or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise SettingError(f"{path}: include must be a path or a list of paths, received '{named}'.")
    for name in named:
        target = os.path.normpath(Path(path).parent / name)
        if not Path(target).is_file():
            raise SettingError(
                f"{path} includes '{name}', but there is no file '{target}'.{nearest_path(Path(target))}"
            )
        yield from _with_included(target, (*including, path))
    yield path


def _refuse_repeated(files: Sequence[tuple[str, str]]) -> None:
    seen: dict[Path, str] = {}
    for path, given in files:
        place = Path(path).resolve()
        if place in seen:
            raise SettingError(
                f"{seen[place]} comes a second time as {_shown(path, given)}, and would undo what files between them "
                "have set. Leave one of the two out."
            )
        seen[place] = _shown(path, given)


def _refuse_two_stages(files: Sequence[tuple[str, str]]) -> None:
    staged = [(stage, _shown(path, given)) for path, given in files if (stage := _stage(content_of(path)))]
    for (stage, first), (other, second) in pairwise(staged):
        if stage != other:
            raise SettingError(
                f"{first} is of a {stage} and {second} of a {other}, which would replace it with all its settings. A "
                "run has one stage: leave one of them out; a file that changes settings of any stage names no "
                "model.class_path."
            )


def _shown(path: str, given: str) -> str:
    return path if path == given else f"{path} (included by {given})"


def _stage(content: Mapping[str, Any]) -> str | None:
    """The project's stage that a file names, if any: a user's own class may well be a variant of what it replaces."""
    model = content.get("model")
    module, _, name = str(model.get("class_path") if isinstance(model, dict) else None).rpartition(".")
    return name if module == "lightning_modules" and name in lightning_modules.__all__ else None
