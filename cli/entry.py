"""Where `train.py` begins: what needs no torch is answered at once, and the rest starts as lightly as it can."""

from __future__ import annotations

import os
import sys

from cli import deferred_modules
from cli.complaints import TRACEBACK_VARIABLE, complain
from cli.subcommands import answer
from flow_rl.errors import SettingError


def main(args: list[str] | None = None) -> None:
    """Run a command line; a bad setting ends in one message and exit status 2.

    Args:
        args: the command line; None for the process's own.
    """
    words = sys.argv[1:] if args is None else args
    try:
        if answer(words):
            return
    except SettingError as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        complain(str(error))
    if {"-h", "--help"} & set(words):
        # A help computes nothing. A run gets its libraries as they are: what is deferred is part of torch's compiler.
        deferred_modules.install()
    from cli import app  # imports Lightning, which the modules must be deferred before

    app.main(args)
