"""The error of a setting that can't be used: apart from what explains it, which needs the command line's libraries."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting that can't be used; the message is for the person who wrote it."""
