"""Bad settings, said in one sentence: what was received, what was expected, and the nearest name that exists.

jsonargparse explains a bad setting by every type that it tried, nested as the settings are. The innermost
line of that text says what is wrong; the keys and classes around it, told by indentation, say where.
"""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from cli.subcommands import SUBCOMMANDS, missing, unknown
from flow_rl.errors import SettingError
from flow_rl.files import STORAGE, reason
from flow_rl.strict_yaml import line_of, read_text
from flow_rl.suggestions import nearest

#: a line that names a type which did not fit, and the value where it is on the same line
TYPE_TRIED = re.compile(
    r"Expected an? (?!path but)(?P<kind>.+?)(?:\. Got value: (?P<value>.*))?$"
    r"|(?:Not a valid|Import path(?: \S+)? does not correspond to a) subclass of (?P<base>\w+)"
)
#: lines that say nothing by themselves, left out where the text is not understood
NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected an? <class 'NoneType'>|Not a valid subclass|"
    r"Subclass types expect|a class path|a dict with|$"
)
#: how jsonargparse asks for an object that has no text of its own, such as a tensor
TENSOR = "dot import path string: "
PLAIN_TYPES = {
    "int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null",
    "dict": "a mapping", "list": "a list", "tuple": "a list",
    TENSOR: "a class path (package.Class)",
}  # fmt: skip


#: what a module and its data are as long as no configuration names a class
UNDECIDED = ("lightning.LightningModule", "lightning.LightningDataModule")


class Place(NamedTuple):
    """Where a line applies: the setting's dotted name, and the innermost class (None for the run's own)."""

    key: str = ""
    class_path: str | None = None


def explain_parsing(error: BaseException, known: Sequence[str]) -> str:
    """One message for an error of parsing.

    Args:
        error: what the parser raised; a link of its chain may carry the `config_file` being read.
        known: dotted names of the settings that the subcommand takes.
    """
    chain = list(_causes(error))
    config = next((link.config_file for link in chain if hasattr(link, "config_file")), None)
    try:
        message = _bad_interpolation(chain, known) or _bad_setting(str(error), known)
    except Exception:  # a text that isn't understood must not hide the error itself
        message = None
    message = message or _shortest(str(error))
    return message if config is None or message.startswith("No file") else f"{_line(config, message)}: {message}"


def _line(config: str, message: str) -> str:
    """The file with the line of the setting that a message is about, where it can be told."""
    setting = re.match(r"([\w.]+)", message)
    unknown = re.search(r"has no (?:setting|class) '([^']+)'", message)
    path = [] if setting is None or message.startswith("The run has") else setting[1].strip(".").split(".")
    path += unknown[1].split(".") if unknown else []
    line = line_of(read_text(config), config, path) if path else None
    return config if line is None else f"{config}:{line}"


def explain_instantiation(error: BaseException) -> str | None:
    """The message of what a constructor refused; None where the error is a fault in the code instead."""
    cause = list(_causes(error))[-1]
    if isinstance(cause, SettingError):
        return str(cause)  # written for people, whatever its length
    refused = isinstance(cause, (ValueError, OSError, ImportError, MisconfigurationException))
    return _shortest(str(cause)) if refused else None


def _bad_interpolation(chain: list[BaseException], known: Sequence[str]) -> str | None:
    fault = next((link for link in chain if isinstance(link, OmegaConfBaseException)), None)
    if fault is None:
        return None
    setting = _without_subcommand(fault.full_key or "A setting")
    if isinstance(fault, GrammarParseError):
        return (
            f"{setting} holds '${{', which begins a reference like ${{run.dir}}, but none that can be read. Write "
            "\\${ for the two characters themselves."
        )
    match = re.search(r"Interpolation key '\.*([^']+)' not found(?: \(resolved to '([^']+)'\))?", str(fault))
    if match is None:
        return f"{setting} holds a reference that can't be resolved: {_shortest(str(fault).splitlines()[0])}."
    name = _without_subcommand(match[2] or match[1])
    return f"{setting} refers to ${{{name}}}: {_unknown(Place(), name, known)}"


def _bad_setting(text: str, known: Sequence[str]) -> str | None:
    places = list(_places(text))
    for place, line in places:
        message = _message(place, line, known)
        if message is not None:
            return message
    tried = [number for number, (_, line) in enumerate(places) if TYPE_TRIED.match(line)]
    return _wrong_type(text, places[tried[0] :]) if tried else None


def _message(place: Place, line: str, known: Sequence[str]) -> str | None:
    """The message of a line that names a mistake; None for other lines."""
    if match := re.search(r"Subcommand '\w+' does not accept option '([^']+)'", line):
        return _unknown(Place(), match[1], known)
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", line):
        return _unknown(place, f"{match[1]}.{match[2]}", known)
    if match := re.search(r"Option '([^']+)' is not accepted", line):
        return _unknown(place, match[1], known)
    if match := re.search(r"\w+ must be a mapping of settings, received .*", line):
        return match[0]
    if match := re.search(r"'[^']+' appears twice in one mapping", line):
        return f"{place.key}: {match[0]}. Only one would count: remove or rename one of them."
    if match := re.search(r"unrecognized arguments: (\S+)", line):
        if match[1].startswith("-"):
            return _unknown(place, match[1].lstrip("-").split("=")[0].rstrip("+"), known)
        return f"Unexpected argument '{match[1]}'. Settings are written --name=value."
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", line):
        return _unknown_class(place, match[1], match[2])
    if match := re.search(r"Expected an instantiatable class, but (\S+) is abstract", line):
        return _abstract(place, match[1])
    if match := re.fullmatch(r"(.+) \((\S+\.py), line (\d+)\)", line):
        return f"{place.key}: {match[2]}, line {match[3]}: {match[1]}."
    if match := re.search(r"No module named '([^']+)'", line):
        packages = [path.parent.name for path in Path(__file__).parents[1].glob("*/__init__.py")]
        return f"{place.key}: no module '{match[1]}'.{nearest(match[1], packages)}"
    if match := re.search(r"the following arguments are required: (.+?)\.?$", line):
        return _missing(place, [_without_subcommand(name) for name in match[1].split(", ")])
    if match := re.search(r"invalid choice: '([^']+)'", line):
        return unknown(match[1])
    if line.startswith('expected "subcommand"'):
        return missing()
    if match := re.search(r"(?:File does not exist|Path is not a file): '([^']+)'", line):
        return _no_file(Path(match[1]))
    if match := re.search(r"Unexpected config:(.*)", line):
        return f"expected lines of 'name: value', received '{match[1].strip()}'."
    return None


def _unknown(place: Place, name: str, known: Sequence[str]) -> str:
    """Find the first part of a dotted name that is no setting, and the nearest one that is."""
    if place.class_path in UNDECIDED:
        return (
            f"{place.key}.{name} is set, but nothing before says which {place.key} it is of. Give the configuration "
            "of a stage first, such as --config configs/demo/t2i_teacher.yaml."
        )
    names = known if place.class_path is None else settings_of(place.class_path)
    where, prefix = place.key, ""
    for part in name.removeprefix("init_args.").split("."):
        siblings = {n[len(prefix) :].split(".")[0] for n in names if n.startswith(prefix)}
        if part not in siblings:
            hint = nearest(part, siblings) or f" It has {', '.join(sorted(siblings))}."
            owner = where if prefix or place.class_path is None else f"{where} ({place.class_path})"
            return f"{owner or 'The run'} has no setting '{part}'.{hint}"
        prefix, where = f"{prefix}{part}.", f"{where}.{part}".lstrip(".")
    return f"{where} can't be set here."


def _unknown_class(place: Place, module: str, name: str) -> str:
    found = importlib.import_module(module)
    # What a room offers by name may be imported only when it is asked for.
    names = getattr(found, "__all__", None) or [n for n in vars(found) if not n.startswith("_")]
    classes = [f"{module}.{n}" for n in names if inspect.isclass(getattr(found, n))]
    return f"{place.key}: '{module}' has no class '{name}'.{nearest(f'{module}.{name}', classes)}"


def _abstract(place: Place, class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    left = sorted(getattr(importlib.import_module(module), name).__abstractmethods__)
    return f"{place.key}: {class_path} can't be used as it is: it does not implement {' and '.join(left)}."


def _missing(place: Place, names: list[str]) -> str:
    if place.class_path is None:
        return f"Nothing says what {' and '.join(names)} should be. Give a --config FILE that does."
    return f"{place.key} ({place.class_path}) needs {', '.join(f'{place.key}.{name}' for name in names)}."


def _no_file(path: Path) -> str:
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    others = {str(p) for p in (*shown.parent.glob("*.yaml"), *Path("configs").rglob("*.yaml"))}
    kind = " (it is a directory)" if path.is_dir() else ""
    return f"No file '{shown}'{kind}.{nearest(str(shown), sorted(others))}"


def _wrong_type(text: str, places: list[tuple[Place, str]]) -> str:
    """The message of a value that no type accepted; `places` starts at the first type tried."""
    kinds, choices, received, key = [], [], None, places[0][0].key
    for _, line in places:
        if match := TYPE_TRIED.match(line):
            kind, received = match["kind"], match["value"]
            if kind is not None and "Literal[" in kind:
                choices += [str(choice) for choice in ast.literal_eval(kind[kind.index("[") :])]
            else:
                kinds.append(f"a class path of a {match['base']}" if kind is None else _plain(kind))
        elif match := re.match(
            r"Given value: (?:NestedArg\(key='[^']*', val=)?'?(.*?)(?:'?\))?(?:\. Got value: .*)?$", line
        ):
            received = match[1]
        if received is not None:
            break
    # An override of one entry of a mapping: the outermost nested argument has its whole name.
    for entry in re.findall(r"NestedArg\(key='([^']+)'", text)[-1:]:
        full = f"{key.split('.')[0]}.{entry}"
        key = full if full.startswith(key) else key
    if choices:
        kinds.insert(0, f"one of {', '.join(dict.fromkeys(choices))}")
    if "a number" in kinds:  # where a tensor would do as well
        kinds = [kind for kind in kinds if kind != PLAIN_TYPES[TENSOR]]
    shown = "null" if received == "None" else f"'{received or '':.80}'"
    expected = " or ".join(k for k in dict.fromkeys(kinds) if k != "null" or len(kinds) == 1)
    return f"{key} must be {expected}, received {shown}.{nearest(received or '', choices)}"


def settings_of(class_path: str) -> list[str]:
    """Dotted names of the settings of a class, those of its dataclasses included."""
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    return list(parser.get_defaults().keys(branches=True))


def _places(text: str) -> Iterator[tuple[Place, str]]:
    """Every line of the explanation with its place, in order."""
    stack: list[tuple[int, str, str]] = []
    for raw in filter(str.strip, text.splitlines()):
        line = raw.strip().removeprefix("- ").strip()
        indent = len(raw) - len(raw.lstrip())
        stack = [entry for entry in stack if entry[0] < indent]
        while match := re.match(r'Parser key "([^"]+)":\s*', line):
            stack.append((indent, "key", match[1]))
            line = line[match.end() :]
        if match := re.search(r"(?:with given |Got value: .*?)class_path'?[=:]? ?'([^']+)'", line):
            stack.append((indent, "class", match[1]))
        classes = [value for _, kind, value in stack if kind == "class"]
        key = ".".join(value for _, kind, value in stack if kind == "key")
        yield Place(key=key, class_path=classes[-1] if classes else None), line


def _plain(kind: str) -> str:
    name = kind.removeprefix("<class '").removesuffix("'>").split("[")[0]
    plain = (words for start, words in PLAIN_TYPES.items() if name == start or (" " in start and start in name))
    return next(plain, f"a {name.rpartition('.')[2]}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _without_subcommand(name: str) -> str:
    return re.sub(rf"^({'|'.join(SUBCOMMANDS)})\.", "", name.strip())


def _shortest(text: str) -> str:
    """The first lines that say something."""
    lines = (line.strip().removeprefix("- ") for line in text.splitlines())
    kept = [line if len(line) <= 600 else f"{line[:600]} ..." for line in lines if not NOISE.match(line)]
    return "\n".join(kept[:4]) or "unknown error"


def refused_by_disk(error: BaseException) -> bool:
    """Whether a file could not be read or written: it names a path, or the disk has no room."""
    return isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
        or (error.errno in STORAGE and error.filename is not None)
    )


def explain_disk(error: BaseException) -> str:
    """The message of an error; where the disk refused, with path and reason in one sentence."""
    if not refused_by_disk(error):
        return str(error)
    assert isinstance(error, OSError)
    if error.filename is None:
        return f"The disk refused to write: {reason(error)}. Free space where the run writes (--run.dir), and resume."
    path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return f"'{path}' can't be read or written: {reason(error)}."
