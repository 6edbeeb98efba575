"""Where the host waits for the device: counted by kind, phase and place in the code."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: frames of these packages count as a library's, unless the project's own code lies further in
LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "torchmetrics", "lightning")
#: parts of a qualified name that depend on Python's version, which inlines some comprehensions
_UNNAMED = re.compile(r"\.<(locals|listcomp|setcomp|dictcomp|genexpr)>")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the code something happened.

    Attributes:
        file: of the project, relative to its root; empty if none of its frames is on the stack.
        line: in that file.
        function: in that file, qualified by its class.
        library: file and line of the innermost library frame that the project called; empty if it did it itself.
    """

    file: str
    line: int
    function: str
    library: str

    def __str__(self) -> str:
        inside = f" (in {self.library})" if self.library else ""
        return f"{self.file or '<no line of the project>'}:{self.line}{inside}"


def here() -> Place:
    """The innermost frame of the project (its tests aside), and the innermost library frame below it."""
    library, frame = "", sys._getframe(1)
    root, tests = f"{ROOT}/", f"{ROOT}/tests/"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/site-packages/" in name:
            package, _, _ = (inner := name.split("/site-packages/")[1]).partition("/")
            if not library and package in LIBRARIES:
                library = f"{inner}:{frame.f_lineno}"
        elif name.startswith(root) and not name.startswith(tests):
            function = _UNNAMED.sub("", frame.f_code.co_qualname)
            return Place(file=name.removeprefix(root), line=frame.f_lineno, function=function, library=library)
        frame = frame.f_back
    return Place(file="", line=0, function="", library=library)


@dataclass(frozen=True, kw_only=True)
class Wait:
    """One kind of wait at one place.

    Attributes:
        kind: such as `item`, `nonzero`, `h2d`.
        phase: of the run.
        place: in the code.
    """

    kind: str
    phase: str
    place: Place


class WaitRecorder:
    """Counts waits.

    Attributes:
        counts: how often each wait happened.
        phase: names the phase of the run when asked.
    """

    def __init__(self, phase: Callable[[], str] = lambda: "") -> None:
        self.counts: Counter[Wait] = Counter()
        self.phase = phase

    def __call__(self, kind: str) -> None:
        self.counts[Wait(kind=kind, phase=self.phase(), place=here())] += 1
