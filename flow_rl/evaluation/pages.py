"""Jinja templates, with what every one of them may use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def environment(**filters: Any) -> Environment:
    """Templates of this folder: everything is escaped but charts, and a name that is not there is an error.

    Args:
        filters: further filters by name.
    """
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    made.filters |= {"number": format} | filters
    return made
