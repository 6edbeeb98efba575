"""The project's classes that a setting may name. They're imported on demand, so what is said of them is said here."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import callbacks
import datamodules
import lightning_modules
import strategies

#: settings that take a class, each with the package that has the project's own and how their names end
ROOMS = {
    "--model": (lightning_modules, ""),
    "--data": (datamodules, "DataModule"),
    "--callbacks.NAME": (callbacks, ""),
    "--trainer.strategy": (strategies, "Strategy"),
}


def described(purpose: str) -> str:
    """A subcommand's purpose, and the classes that its settings may name."""
    lists = []
    for setting, (room, ending) in ROOMS.items():
        names = [f"{room.__name__}.{name}" for name in room.__all__ if name.endswith(ending)]
        lists.append(f"{setting}: {', '.join(names)}.")
    return f"{purpose} Classes of this project for {' For '.join(lists)}"


def import_named(text: str) -> bool:
    """Import the project's classes that an error names: a class may be named without its package once it's imported.

    Args:
        text: what the parser said.

    Returns:
        Whether there are any that the parser didn't know.
    """
    words = set(re.findall(r"\w+", text))
    found = [(room, name) for room, _ in ROOMS.values() for name in room.__all__ if name in words]
    new = [(room, name) for room, name in found if not _known(room, name)]
    return bool([getattr(room, name) for room, name in new])


def _known(room: ModuleType, name: str) -> bool:
    return any(
        module.startswith(f"{room.__name__}.") and name in vars(loaded) for module, loaded in [*sys.modules.items()]
    )
