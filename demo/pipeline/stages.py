"""The demo's stages: each is one plain command, with what it reads and what it makes."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage, as the report shows it.
        arguments: what comes after `python`.
        inputs: files and directories whose contents the result depends on; of code, whole rooms.
        output: a file or directory that is there once the stage is done.
        checkpoints: directory of a training's checkpoints, from whose `last.ckpt` it can resume; None starts anew.
        makes: files that other stages may read; empty for all that lies in the output's folder.
        resumes_from: files from which the command itself resumes, or that it would not replace. They are removed where
            its inputs have changed.
    """

    name: str
    arguments: Sequence[str]
    inputs: Sequence[Path]
    output: Path
    checkpoints: Path | None = None
    makes: Sequence[Path] = ()
    resumes_from: Sequence[Path] = ()

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        return shlex.join(["python", *self.arguments])

    def reads(self, other: Stage) -> bool:
        """Whether another stage has to be done first: it makes an input of this one."""
        folder = other.output if other.output.suffix == "" else other.output.parent
        made = other.makes or (folder,)
        return any(path == place or place in path.parents for path in self.inputs for place in made)

    def fingerprint(self) -> str:
        """Hash of the command and of everything it reads."""
        digest = hashlib.sha256(self.command.encode())
        for path in self.inputs:
            if not path.exists():
                raise FileNotFoundError(f"Stage '{self.name}' reads '{path}', which is not there.")
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            files = [p for p in files if p.suffix != ".pyc"]
            for file in files:
                state = file.stat()
                digest.update(file.as_posix().encode())
                digest.update(_digest(file.absolute(), state.st_size, state.st_mtime_ns))
        return digest.hexdigest()


@cache
def _digest(file: Path, _size: int, _changed_ns: int) -> bytes:
    """Hash of a file's contents. Most stages read the same rooms of code: each file is read once for all of them."""
    return hashlib.sha256(file.read_bytes()).digest()
