"""The callbacks of a run by name: `callbacks: {ema: {class_path: callbacks.WeightEMA, init_args: {decay: 0.9}}}`.

Any later `--config` or `--callbacks.ema.init_args.decay=0.95` changes one of them, `ema: null` takes it out, and a new
name with a class path adds one. They run in the order in which the stack names them first; a null in the first file
that has any keeps a place. Lightning itself then moves those that write checkpoints behind all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning import Callback
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from cli.config_stack import content_of
from flow_rl.errors import SettingError
from flow_rl.strict_yaml import YamlError, parse, values
from flow_rl.suggestions import nearest

OPTION = "--callbacks."
#: what takes out all callbacks
NONE = "--config=configs/callbacks/none.yaml"


def callback_names(args: Sequence[str]) -> list[str]:
    """Names of all callbacks of a command line, in the order in which they run.

    Args:
        args: the command line, every included file on it.

    Raises:
        SettingError: settings for a name that has no class so far, the removal of one that nothing has named, or a
            list in place of names.
    """
    defined: dict[str, bool] = {}  # whether it has a class as of the files and options that were read
    for where, section in _sections(args):
        if section is None:
            defined = dict.fromkeys(defined, False)
            continue
        if not isinstance(section, Mapping):
            raise SettingError(
                f"{where}: callbacks must be a mapping of names: callbacks: {{mine: {{class_path: my_package.Mine}}}}."
            )
        first = not defined
        for name, value in section.items():
            _check(where, name, value, defined, first=first)
            defined[name] = value is not None
    return list(defined)


def built_callbacks(cli: Any) -> dict[str, Callback]:
    """The callbacks that a CLI has built, by name and in order.

    Those of a list in `trainer.callbacks`, which has no names, are called by their place: `trainer.callbacks[0]`.
    """
    built = cli.config_init[cli.subcommand]
    listed = {f"trainer.callbacks[{place}]": c for place, c in enumerate(_as_list(built.trainer.callbacks))}
    named = built.get("callbacks") or {}
    return listed | {name: callback for name, callback in named.items() if callback is not None}


def refuse_mixture(config: Any) -> None:
    """Refuse a list in `trainer.callbacks` beside names: it might be meant to replace them, or to be added.

    Args:
        config: of a subcommand, parsed.

    Raises:
        SettingError: both are there.
    """
    named = [name for name, value in vars(config.get("callbacks", Namespace())).items() if value is not None]
    listed = _as_list(config.trainer.callbacks)
    if named and listed:
        raise SettingError(
            f"trainer.callbacks is a list, and this run has callbacks by name ({', '.join(named)}). Give each of the "
            f"list a name, as in callbacks: {{mine: {{class_path: {listed[0].class_path}}}}} or "
            f"--callbacks.mine={listed[0].class_path}; {NONE} before it takes out all others."
        )


def _sections(args: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What files and options say of callbacks, in order, each with where it stands."""
    rest = iter(args)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if key == "--config":
            content = content_of(value)
            if "callbacks" in content:
                yield value, content["callbacks"]
        elif key == OPTION.rstrip("."):
            raise SettingError(
                f"{key} names no callback: --callbacks.NAME=... changes one; {NONE} takes out all of them."
            )
        elif key.startswith(OPTION):
            name, _, setting = key.removeprefix(OPTION).partition(".")
            value = value if equals else next(rest, "")
            yield key, {name: {setting: value} if setting else _parsed(value)}


def _parsed(value: str) -> Any:
    try:
        return values(parse(value, OPTION))
    except YamlError:
        return value


def _check(where: str, name: Any, value: Any, defined: Mapping[str, bool], *, first: bool) -> None:
    if not (isinstance(name, str) and name.isidentifier()):
        raise SettingError(f"{where}: '{name}' can't name a callback: use letters, digits and underscores.")
    if value is None:
        if not first and name not in defined:
            raise SettingError(
                f"{where}: there is no callback '{name}' to take out.{_hint(name, defined)} A stage comes before what "
                "changes it."
            )
        return
    has_class = isinstance(value, str) or (isinstance(value, Mapping) and "class_path" in value)
    if not has_class and not defined.get(name):
        raise SettingError(
            f"{where}: callbacks.{name} names no class_path, and no callback of this run has that name."
            f"{_hint(name, [known for known, has in defined.items() if has])} To add one, give its class: "
            f"callbacks: {{{name}: {{class_path: my_package.MyCallback}}}}."
        )


def _hint(name: str, known: Iterable[str]) -> str:
    return nearest(name, known) or (f" It has {', '.join(known)}." if known else "")


def _as_list(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def wanted(callbacks: Iterable[Callback], trainer: Any) -> list[Callback]:
    """The callbacks without those that the Trainer's switches take out.

    A config names a progress bar and a checkpoint, and Lightning refuses both where its switch is off. The switch means
    that the user wants none.

    Args:
        callbacks: in the order in which they run.
        trainer: arguments of the Trainer, with `enable_progress_bar` and `enable_checkpointing`.
    """
    off: tuple[type[Callback], ...] = ()
    if trainer.enable_progress_bar is False:
        off += (ProgressBar,)
    if trainer.enable_checkpointing is False:
        off += (Checkpoint,)
    return [callback for callback in callbacks if not isinstance(callback, off)]
