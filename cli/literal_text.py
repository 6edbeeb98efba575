"""What was written as a name, a path or a word stays one, in files and on the command line.

jsonargparse reads a text as YAML before it looks at the type of the setting, so that a run named `77950e8` becomes a
number, and hands its result through two more YAML readers, each with its own idea of what is a number. Here the type
of a setting decides: a `Scalar` keeps its text until a type is known. Its functions that do so are replaced;
the requirements pin the version that they belong to.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, _core, _loaders_dumpers, _typehints, set_dumper, set_loader
from jsonargparse._common import parser_context
from jsonargparse._optionals import omegaconf_absolute_to_relative_paths
from typing_extensions import override

from flow_rl.errors import SettingError
from flow_rl.strict_yaml import TRUTH_WORDS, Scalar, YamlError, is_ambiguous, parse, quoted, read_text, value_of, values

#: the parser mode whose loader is replaced
MODE = "omegaconf+"
_NONE = type(None)
#: stands for `\\${`, two characters that begin no reference, until all references are resolved
_ESCAPED = "\ue000{"
#: whether references are in what is dumped
_resolving: ContextVar[bool] = ContextVar("resolving", default=False)
_adapt: Callable[..., Any] = _typehints.adapt_typehints
_signature = inspect.signature(_adapt)


def install() -> None:
    """Put the functions of this module into jsonargparse; a second call changes nothing."""
    set_loader(MODE, _load, (yaml.YAMLError, YamlError))
    set_dumper("yaml", dump)
    _typehints.adapt_typehints = _adapt_literally
    _typehints.basic_json_or_yaml_load = value_of
    _loaders_dumpers.load_basic = _load_basic
    _core.omegaconf_apply = _resolve


class LiteralParser(ArgumentParser):
    """Reads configuration files strictly, and takes no abbreviation for a name."""

    #: the file that is being read
    reading = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A misspelt name that happens to be the beginning of another would silently set that one.
        super().__init__(*args, **{"allow_abbrev": False, "parser_mode": MODE, **kwargs})

    @override
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).is_file():
            read_text(path)  # before jsonargparse does, which would name neither file nor line
        before, self.reading = self.reading, str(path)
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            self.reading = before

    @override
    def _load_config_parser_mode(
        self, content: str, path: Any = "", ext_vars: Any = None, prev_cfg: Namespace | None = None
    ) -> Namespace:
        try:
            tree = self.settings_in(parse(content, self.reading))
        except SettingError as error:
            raise error if self.reading else TypeError(str(error)) from None
        if not isinstance(tree, dict):
            raise TypeError(f"Unexpected config: {content}")
        self._check_sections(tree)
        return self._apply_actions(_relative(tree), prev_cfg=prev_cfg)

    def _check_sections(self, tree: dict[str, Any]) -> None:
        """Refuse a value for what only groups settings; a section that is empty says nothing."""
        sections = {action.dest.split(".")[0] for action in self._actions if "." in action.dest}
        typed = {action.dest for action in self._actions if isinstance(action, _typehints.ActionTypeHint)}
        for name in sections - typed:
            if name in tree and not isinstance(tree[name], dict):
                if tree[name] != "":
                    raise TypeError(f"{name} must be a mapping of settings, received {_shown(tree[name])}.")
                del tree[name]

    def settings_in(self, tree: Any) -> Any:
        """What of a file's content is settings."""
        return tree


def _shown(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"'{value}'"


def finished(config: Any) -> Any:
    """A parsed configuration in which whatever no type has claimed has the value that YAML gives it."""
    if isinstance(config, Namespace):
        for key, value in vars(config).items():
            setattr(config, key, finished(value))
        return config
    if isinstance(config, dict):
        return {key: finished(value) for key, value in config.items()}
    if type(config) in (list, tuple):
        return type(config)(finished(value) for value in config)
    value = config.value if isinstance(config, Scalar) else config
    return value.replace(_ESCAPED, "${") if type(value) is str else value


def read_as(text: str, kind: Any, *, plain: bool = True) -> Any:
    """What a scalar is for a setting of a type; its text where the type takes texts and nothing nearer.

    Args:
        text: as written, without quotes.
        kind: the type of the setting.
        plain: it was written without quotes, so it may be null.
    """
    kinds = _members(kind)
    value = value_of(text) if plain else text
    choices = [choice for member in kinds if get_origin(member) is Literal for choice in get_args(member)]
    if text in [choice for choice in choices if isinstance(choice, str)]:
        return str(text)
    if any(type(choice) is type(value) and choice == value for choice in choices):
        return value
    if (value is None and _NONE in kinds) or type(value) in kinds or (type(value) is int and float in kinds):
        return value
    if any(member is str or (isinstance(member, type) and issubclass(member, Path)) for member in kinds):
        return str(text)
    if bool in kinds and text.lower() in TRUTH_WORDS:
        return TRUTH_WORDS[text.lower()]
    if not plain and {int, float, bool} & set(kinds):  # a number in quotes where only a number can stand
        return read_as(text, kind)
    return value


def dump(data: Any) -> str:
    """YAML in which every text that some reader might take for something else is quoted."""
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes more than PyYAML does."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    text = text if _resolving.get() else text.replace("${", r"\${")
    text = text.replace(_ESCAPED, r"\${")
    style = "'" if is_ambiguous(text) and "\n" not in text else None
    if re.search("[\r\x85\u2028\u2029]", text):  # line breaks that only double quotes keep
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style=style)


def _represent_scalar(dumper: yaml.SafeDumper, scalar: Scalar) -> yaml.Node:
    return dumper.represent_data(scalar.value)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Scalar, _represent_scalar)


def _load_basic(text: str) -> Any:
    """What jsonargparse tries before the loader: numbers, truth values and null."""
    value = value_of(text.strip())
    return _loaders_dumpers.not_loaded if isinstance(value, str) or not text.strip() else value


def _load(text: str) -> Any:
    """The loader of jsonargparse, which calls it for whole files, and for every text whose type isn't known yet."""
    tree = parse(text, "value")
    if isinstance(tree, Scalar):
        return tree.value
    if isinstance(tree, dict) and tree and all(value == "" for value in tree.values()):
        return text  # `a:` and `{a, b}` are texts; so they are in jsonargparse
    return _protected(tree)  # `_resolve` makes its references relative, from where it will stand


def _relative(tree: dict[str, Any]) -> Any:
    """References as jsonargparse resolves them under a subcommand: `${run.dir}` from the top of the file."""
    return _kept(tree, omegaconf_absolute_to_relative_paths(_protected(tree)))


def _protected(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _protected(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_protected(value) for value in tree]
    if isinstance(tree, str) and r"\${" in tree:
        text = tree.replace(r"\${", _ESCAPED)
        return Scalar(text, tree.plain) if isinstance(tree, Scalar) else text
    return tree


def _kept(before: Any, after: Any) -> Any:
    """The second tree with the scalars of the first, which has the same shape."""
    if isinstance(before, Scalar):
        return Scalar("".join(after), before.plain)
    if isinstance(before, dict):
        return {key: _kept(value, after[key]) for key, value in before.items()}
    if isinstance(before, list):
        return [_kept(value, after[place]) for place, value in enumerate(before)]
    return after


def _adapt_literally(*args: Any, **kwargs: Any) -> Any:
    """`adapt_typehints` of jsonargparse, for which a scalar is what its type makes of it."""
    bound = _signature.bind(*args, **kwargs)
    value, kind = bound.arguments["val"], bound.arguments["typehint"]
    final = bound.arguments.get("instantiate_classes") or bound.arguments.get("serialize")
    if final and isinstance(value, str) and (isinstance(value, Scalar) or str in _members(kind)):
        return value
    if isinstance(value, Scalar):
        read = read_as(value, kind, plain=value.plain)
        if type(read) is str and {str, Any, object} & set(_members(kind)):
            # jsonargparse looks at values several times: until it is done, the text stays what it is.
            return Scalar(read, plain=False)
        bound.arguments["val"] = read
    elif type(value) is str and kind is bool:
        bound.arguments["val"] = read_as(value, kind)
    return _adapt(*bound.args, **bound.kwargs)


def _members(kind: Any) -> list[Any]:
    """The types of a union, or the type itself; aliases and `Annotated` are looked into."""
    if get_origin(kind) in (Union, types.UnionType):
        return [member for part in get_args(kind) for member in _members(part)]
    if hasattr(kind, "__metadata__"):
        return _members(get_args(kind)[0])
    return [kind]


def _resolve(parser: Any, config: Any) -> Any:
    """`omegaconf_apply` of jsonargparse, without a YAML reader between: references are put in, texts stay texts."""
    if "${" not in str(config):
        return config
    from omegaconf import OmegaConf

    token = _resolving.set(True)
    try:
        with parser_context(path_dump_preserve_relative=True):
            text = parser.dump(config, skip_validation=True, skip_unset=False, skip_link_targets=False)
    finally:
        _resolving.reset(token)
    tree = _protected(values(parse(text, "config")))
    if parser._subcommands_action is not None:  # references on the command line are not relative yet
        tree = {key: omegaconf_absolute_to_relative_paths(v) if isinstance(v, dict) else v for key, v in tree.items()}
    resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    return parser._apply_actions(_literal(tree, resolved))


def _literal(before: Any, after: Any) -> Any:
    """The resolved tree, whose texts are quoted scalars and whose references to anything else may become texts."""
    if isinstance(after, dict):
        return {str(k): _literal(before.get(k) if isinstance(before, dict) else None, v) for k, v in after.items()}
    if isinstance(after, list):
        earlier = before if isinstance(before, list) else [None] * len(after)
        return [_literal(earlier[place], value) for place, value in enumerate(after)]
    if isinstance(after, str):
        return quoted(after)
    if isinstance(before, str):  # a reference alone, as in `name: ${run.seed}`
        return Scalar("null" if after is None else repr(after).lower())
    return after
