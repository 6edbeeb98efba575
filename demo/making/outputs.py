"""Where the makers of models write: looked at before they train."""

from __future__ import annotations

import argparse
from pathlib import Path

from flow_rl.errors import SettingError
from flow_rl.files import refuse_foreign_folder


def check_output(parser: argparse.ArgumentParser, directory: Path) -> None:
    """End with a message where a folder holds what no maker wrote."""
    try:
        refuse_foreign_folder(directory)
    except SettingError as error:
        parser.error(f"--output: {error}")
