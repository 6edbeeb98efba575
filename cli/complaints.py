"""How an error is shown: one message on lines of its own, and exit status 2."""

from __future__ import annotations

import sys
from typing import NoReturn

#: set to 1 to see the traceback of a bad setting
TRACEBACK_VARIABLE = "FLOW_RL_TRACEBACK"


def complain(message: str) -> NoReturn:
    """Print a message for people and exit.

    Raises:
        SystemExit: always, with status 2.
    """
    end_bars()
    print(f"error: {message}\n(set {TRACEBACK_VARIABLE}=1 to see where it came from)", file=sys.stderr)
    sys.exit(2)


def end_bars() -> None:
    """Close every progress bar that stands open, so that what is printed next begins on a line of its own."""
    if "tqdm" not in sys.modules:
        return  # nobody can have opened one
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.leave = True  # one that would vanish leaves the cursor in its line
        bar.close()
