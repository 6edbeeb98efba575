"""The demo's stages: each is one plain command, run again only when what it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage, as the report shows it.
        arguments: what comes after `python`.
        inputs: files and directories whose contents the result depends on.
        output: a file or directory that is there once the stage is done.
    """

    name: str
    arguments: Sequence[str]
    inputs: Sequence[Path]
    output: Path

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        return shlex.join(["python", *self.arguments])

    def fingerprint(self) -> str:
        """Hash of the command and of everything it reads."""
        digest = hashlib.sha256(self.command.encode())
        for path in self.inputs:
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            for file in files:
                digest.update(file.as_posix().encode())
                digest.update(file.read_bytes())
        return digest.hexdigest()


@dataclass(kw_only=True)
class StageRunner:
    """Runs stages in order and remembers, in `<directory>/stages.json`, what was done and how long it took.

    Attributes:
        directory: of the whole demo run.
        seconds: wall-clock time of each stage, of this run or of the one that did it.
    """

    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, stage: Stage, position: str) -> None:
        """Run a stage, or skip it if it was done with the same inputs.

        Args:
            stage: what to run.
            position: such as "2/4", for the heading.

        Raises:
            SystemExit: the command failed; its own message has been shown.
        """
        done = self._read()
        fingerprint = stage.fingerprint()
        entry = done.get(stage.name, {})
        if entry.get("fingerprint") == fingerprint and stage.output.exists():
            self.seconds[stage.name] = entry["seconds"]
            print(f"\n[{position}] {stage.name}: done before ({entry['seconds']:.0f} s), inputs unchanged", flush=True)
            return
        print(f"\n[{position}] {stage.name}\n    {stage.command}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, *stage.arguments], check=False).returncode
        if status != 0:
            sys.exit(f"Stage '{stage.name}' ended with status {status}. The command was:\n    {stage.command}")
        self.seconds[stage.name] = time.perf_counter() - start
        done[stage.name] = {"fingerprint": fingerprint, "seconds": round(self.seconds[stage.name], 1)}
        self._write(done)

    def _read(self) -> dict[str, dict]:
        path = self.directory / "stages.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _write(self, done: dict[str, dict]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / "stages.json.partial"
        partial.write_text(json.dumps(done, indent=2), encoding="utf-8")
        partial.replace(self.directory / "stages.json")
