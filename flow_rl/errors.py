"""Errors whose message is for the person who runs the project."""

from __future__ import annotations

from collections.abc import Sequence


class SettingError(ValueError):
    """A setting that can't be used; the message is for the person who wrote it."""


class RunStopped(RuntimeError):
    """Training ends here; the message says what happened and what to look at."""


def refuse(found: Sequence[str]) -> None:
    """Stop if anything was found to be wrong.

    Raises:
        SettingError: with all of it, numbered where there is more than one thing.
    """
    if found:
        listed = "".join(f"\n  {number}. {text}" for number, text in enumerate(found, 1))
        raise SettingError(found[0] if len(found) == 1 else listed)


def check_above_zero(section: str, **values: float) -> None:
    """Refuse settings that are not above 0.

    Args:
        section: of the config that has them, such as `model.objective`.
        **values: by name.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{section}.{name} is {value}; it must be above 0.")


def check_at_least(least: float, section: str, **values: float) -> None:
    """Refuse settings below `least`; see `check_above_zero`.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{section}.{name} is {value}; it must be at least {least:g}.")


class CannotWrite(RunStopped):
    """The disk refused something; the message has the path, the reason and what was kept."""
