"""The demo's stages: each is one plain command, with what it reads and what it makes."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage, as the report shows it.
        arguments: what comes after `python`.
        inputs: files and directories whose contents the result depends on.
        output: a file or directory that is there once the stage is done.
        checkpoints: directory of a training's checkpoints, from whose `last.ckpt` it can go on; None starts anew.
        needs: a path without which the stage is left out, such as a model that is not shipped; None always runs.
    """

    name: str
    arguments: Sequence[str]
    inputs: Sequence[Path]
    output: Path
    checkpoints: Path | None = None
    needs: Path | None = None

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        return shlex.join(["python", *self.arguments])

    def reads(self, other: Stage) -> bool:
        """Whether another stage has to be done first: an input is its output, or lies beside it."""
        made = other.output if other.output.suffix == "" else other.output.parent
        return any(path == made or made in path.parents for path in self.inputs)

    def fingerprint(self) -> str:
        """Hash of the command and of everything it reads."""
        digest = hashlib.sha256(self.command.encode())
        for path in self.inputs:
            if not path.exists():
                raise FileNotFoundError(f"Stage '{self.name}' reads '{path}', which is not there.")
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            files = [p for p in files if p.suffix != ".pyc"]
            for file in files:
                digest.update(file.as_posix().encode())
                digest.update(file.read_bytes())
        return digest.hexdigest()
