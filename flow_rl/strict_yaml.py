"""YAML that is read as it was written: nothing appears twice, and a word stays a word.

YAML 1.1 turns the word `on` into true, `012` into ten, `1:30` into ninety and `2026-07-01` into a date, and parsers
keep the last of two equal keys without a word. Here equal keys are an error with both lines, and a scalar keeps its
text (`Scalar`) until somebody knows which type is wanted. Numbers follow YAML 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from typing_extensions import override

from flow_rl.errors import SettingError

#: libyaml's parser is ten times faster, and a demo reads hundreds of files before its first stage
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = re.compile(r"~|null|Null|NULL|")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_OTHER_BASE = re.compile(r"0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_TRUTH = {"true": True, "false": False}
#: words that YAML 1.1 takes for truth values; here they are words wherever no truth value is asked for
TRUTH_WORDS = _TRUTH | {"yes": True, "no": False, "on": True, "off": False}
_STANDARD = "tag:yaml.org,2002:"
_MERGE = f"{_STANDARD}merge"


class YamlError(SettingError):
    """A text that is no YAML; the message begins with `FILE:LINE:`."""


class RepeatedKeyError(SettingError):
    """A mapping that has a key twice; the message begins with `FILE:LINE:`."""


class Scalar(str):
    """The text of a scalar that a YAML parser would take for something else than a text.

    Args:
        text: as written, without quotes.
        plain: written without quotes or tag, so that it may stand for a number, a truth value or null.
    """

    plain: bool

    def __new__(cls, text: str, plain: bool = True) -> Scalar:  # noqa: D102
        made = super().__new__(cls, text)
        made.plain = plain
        return made

    def __getnewargs__(self) -> tuple[str, bool]:  # type: ignore[override]
        return str(self), self.plain

    def __copy__(self) -> Scalar:
        return self

    def __deepcopy__(self, memo: Any) -> Scalar:
        return self

    @override
    def __str__(self) -> str:
        return "".join(self)  # an ordinary text

    @property
    def value(self) -> Any:
        """What it stands for where no type is asked for: its text, if it was quoted."""
        return value_of(self) if self.plain else str(self)


def value_of(text: str) -> Any:
    """The number, truth value or null that a plain scalar stands for in YAML 1.2; else the text."""
    if _NULL.fullmatch(text):
        return None
    if text.lower() in _TRUTH and text in (text.lower(), text.upper(), text.capitalize()):
        return _TRUTH[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return str(text)


def is_ambiguous(text: str) -> bool:
    """Whether some YAML reader takes the text, written plainly, for something else: it must be quoted in a file."""
    return bool(re.match(r"[-+.~0-9]|$", text)) or text.lower() in (*TRUTH_WORDS, "null", "y", "n")


def quoted(text: str) -> str:
    """A text that stands for itself, whoever reads it once more: a `Scalar`, unless it is a word in any case."""
    return text if re.fullmatch(r"[A-Za-z_/][\w./-]*", text) and not is_ambiguous(text) else Scalar(text, plain=False)


def values(tree: Any) -> Any:
    """A tree with the value of every `Scalar` in it."""
    if isinstance(tree, Scalar):
        return tree.value
    if isinstance(tree, dict):
        return {key: values(value) for key, value in tree.items()}
    return [values(value) for value in tree] if isinstance(tree, list) else tree


def read_text(path: str | Path) -> str:
    """The text of a file, without the byte order mark that some editors put first.

    Raises:
        YamlError: not UTF-8.
        OSError: not a file that can be read.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = " It begins like UTF-16." if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise YamlError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8.{hint} Save the file as UTF-8."
        ) from None


def load(path: str | Path) -> Any:
    """What a YAML file holds, as plain values; see `parse`.

    Raises:
        SettingError: not UTF-8, no YAML, or equal keys in a mapping.
        OSError: not a file that can be read.
    """
    return values(parse(read_text(path), str(path)))


def parse(text: str, name: str) -> Any:
    """What a YAML text holds: mappings with text keys, lists, texts, and a `Scalar` for whatever else a scalar may be.

    Args:
        text: to read.
        name: of the file or option, for messages.

    Raises:
        YamlError: no YAML, a key that is no scalar, or an anchor that contains itself.
        RepeatedKeyError: equal keys in a mapping.
    """
    node = compose(text, name)
    return None if node is None else _Builder(name).build(node)


def compose(text: str, name: str) -> yaml.Node | None:
    """The nodes of a YAML text; None where it is empty.

    Raises:
        YamlError: no YAML.
    """
    loader = _PARSER(text.removeprefix("\ufeff"))
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}"
        raise YamlError(f"{place}: not valid YAML (column {mark.column + 1}): {_plain(error, text)}.") from None
    except (yaml.reader.ReaderError, RecursionError) as error:
        reason = getattr(error, "reason", "nested too deeply")
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise YamlError(f"{name}:{line}: not valid YAML: {reason}.") from None
    finally:
        loader.dispose()


class Written(NamedTuple):
    """A key of a mapping, however deep, and the line where it stands."""

    path: tuple[str, ...]
    line: int
    leaf: bool


def keys_of(text: str, name: str) -> Iterator[Written]:
    """All keys of a YAML text with their lines, a mapping before what it holds.

    Raises:
        YamlError: see `parse`.
    """
    node = compose(text, name)
    yield from () if node is None else _keys(node, ())


def line_of(text: str, name: str, path: list[str]) -> int | None:
    """The line of the deepest key of a path that a text holds; None if it holds not even the first.

    Args:
        text: YAML.
        name: see `parse`.
        path: keys from the top. `init_args` may be left out, as on the command line.
    """
    node, line = compose(text, name), None
    for part in path:
        found = _child(node, part) or _child(getattr(_child(node, "init_args"), "value", None), part)
        if found is None:
            return line
        line, node = found.line, found.value
    return line


class _Child(NamedTuple):
    line: int
    value: yaml.Node


def _child(node: yaml.Node | None, key: str) -> _Child | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    found = [(k, v) for k, v in node.value if k.value == key]
    return _Child(line=found[-1][0].start_mark.line + 1, value=found[-1][1]) if found else None


def _keys(node: yaml.Node, path: tuple[str, ...], seen: tuple[int, ...] = ()) -> Iterator[Written]:
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            place = (*path, key.value)
            yield Written(path=place, line=key.start_mark.line + 1, leaf=not isinstance(value, yaml.MappingNode))
            yield from _keys(value, place, (*seen, id(node)))


class _Builder:
    """Makes plain Python of nodes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._resolver = yaml.resolver.Resolver()
        self._inside: list[int] = []

    def build(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._inside:
            raise self._error(node, "an anchor contains itself, and has no end")
        self._inside.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                self._check_tag(node, "map")
                return self._mapping(node)
            self._check_tag(node, "seq")
            return [self.build(item) for item in node.value]
        finally:
            self._inside.pop()

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text, tag = node.value, node.tag.removeprefix(_STANDARD)
        plain = node.style in (None, "")  # the parser in C says "", the one in Python None
        if plain and node.tag == self._resolver.resolve(yaml.ScalarNode, text, (True, False)):
            # Nobody wrote a tag: what YAML 1.1 makes of the scalar doesn't matter.
            return Scalar(text) if is_ambiguous(text) else text
        if tag not in ("str", "int", "float", "bool", "null"):
            raise self._unknown_tag(node)
        return Scalar(text, tag != "str") if tag != "str" else quoted(text)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        own: dict[str, tuple[int, Any]] = {}
        merged: dict[str, Any] = {}
        merges: int | None = None
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be a word, not a list or a mapping")
            if key.tag == _MERGE:
                if merges is not None:
                    raise self._error(key, f"'<<' appears twice in one mapping, first on line {merges}; give it a list")
                merges, merged = line, self._merged(value)
                continue
            if key.value in own:
                first = own[key.value][0]
                raise RepeatedKeyError(
                    f"{self.name}:{line}: '{key.value}' appears twice in one mapping, first on line {first}: only one "
                    "would count. Remove or rename one of them."
                )
            own[key.value] = (line, self.build(value))
        return merged | {key: value for key, (_, value) in own.items()}

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            found = self.build(part)
            if not isinstance(found, Mapping):
                raise self._error(part, "'<<' takes a mapping or a list of mappings")
            merged = dict(found) | merged  # the first one that has a key wins
        return merged

    def _check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != _STANDARD + kind:
            raise self._unknown_tag(node)

    def _unknown_tag(self, node: yaml.Node) -> YamlError:
        tag = node.tag.replace(_STANDARD, "!!")
        return self._error(node, f"the tag {tag} is not supported: write the value without it")

    def _error(self, node: yaml.Node, message: str) -> YamlError:
        return YamlError(f"{self.name}:{node.start_mark.line + 1}: {message}.")


def _plain(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    if text.splitlines()[mark.line : mark.line + 1] and "\t" in text.splitlines()[mark.line][mark.column :][:1]:
        return "a tab, where only spaces may stand"
    if "document" in str(error.context):
        return "a second document ('---'); a file holds one"
    return str(error.problem or error.context)
