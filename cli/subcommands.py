"""What `train.py` does, by name, and the answers that need neither torch nor Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser

from flow_rl.errors import SettingError
from flow_rl.suggestions import nearest

DESCRIPTION = "Trains, samples and scores image generators, and checks a configuration before it costs anything."
#: every subcommand with what it does
SUBCOMMANDS = {
    "fit": "Train.",
    "validate": "Evaluate a model or a checkpoint on the validation data.",
    "test": "Evaluate a model or a checkpoint on the test data.",
    "predict": "Make images, which callbacks write.",
    "curate": "Score rollouts of every training prompt, and report which prompts a threshold keeps.",
    "doctor": "Check a configuration and plan its memory and time; loads nothing.",
}
#: answered before LightningCLI, by a parser of its own
DOCTOR = "doctor"

Parser = TypeVar("Parser", bound=ArgumentParser)


def with_config(parser: Parser) -> Parser:
    """Add `--config`, which every parser of the command line takes."""
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
    )
    return parser


def light_parser() -> ArgumentParser:
    """The parser of `train.py`, whose subcommands take no settings yet: its help is that of the whole one."""
    parser = with_config(ArgumentParser(description=DESCRIPTION))
    added = parser.add_subcommands()
    for name, purpose in SUBCOMMANDS.items():
        added.add_subcommand(name, with_config(ArgumentParser()), help=purpose)
    return parser


def answer(args: Sequence[str]) -> bool:
    """Answer a command line that asks for the help of `train.py`, or names no subcommand.

    Args:
        args: the command line.

    Returns:
        Whether that was all.

    Raises:
        SettingError: the first word is no subcommand, or there is none.
    """
    if not args:
        raise SettingError(missing())
    if not args[0].startswith("-") and args[0] not in SUBCOMMANDS:
        raise SettingError(unknown(args[0]))
    asked = list(args) in (["-h"], ["--help"])
    if asked:
        light_parser().print_help()
    return asked


def unknown(name: str) -> str:
    """The message for a word that is no subcommand."""
    return f"Unknown subcommand '{name}'; choose one of {', '.join(SUBCOMMANDS)}.{nearest(name, SUBCOMMANDS)}"


def missing() -> str:
    """The message for a command line without a subcommand."""
    return f"Say what to do: train.py {' | '.join(SUBCOMMANDS)} --config FILE."
