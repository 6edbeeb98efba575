"""The demo's stages: each is one plain command, run again only when what it depends on has changed.

A training that was interrupted goes on from its last checkpoint, if the command and everything it reads are the same.
"""

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
from typing import Any


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


@dataclass(kw_only=True)
class StageRunner:
    """Runs stages in order and remembers, in `<directory>/stages.json`, what was done and how long it took.

    Attributes:
        directory: of the whole demo run.
        seconds: wall-clock time of each stage, of this run or of the ones that did it.
        left_out: stages that could not run, with the reason.
    """

    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self, stage: Stage, position: str) -> None:
        """Run a stage, go on with it, or skip it if it was done with the same inputs.

        Args:
            stage: what to run.
            position: such as "2/4", for the heading.

        Raises:
            SystemExit: the command failed; its own message has been shown.
        """
        if stage.needs is not None and not stage.needs.exists():
            self.left_out[stage.name] = f"'{stage.needs}' is not there"
            print(f"\n[{position}] {stage.name}: left out, {self.left_out[stage.name]}", flush=True)
            return
        fingerprint = stage.fingerprint()
        entry = self._read().get(stage.name, {})
        same = entry.get("fingerprint") == fingerprint
        if same and entry.get("done") and stage.output.exists():
            self.seconds[stage.name] = entry["seconds"]
            print(f"\n[{position}] {stage.name}: done before ({entry['seconds']:.0f} s), inputs unchanged", flush=True)
            return
        last = stage.checkpoints / "last.ckpt" if stage.checkpoints is not None else None
        resumes = same and not entry.get("done") and last is not None and _newer(last, entry["started"])
        # What was spent up to the checkpoint counts; what came after it is done again.
        before = last.stat().st_mtime - entry["started"] + entry["seconds"] if resumes else 0.0
        self._remember(stage.name, fingerprint=fingerprint, done=False, seconds=before, started=time.time())
        print(f"\n[{position}] {stage.name}{' (goes on)' if resumes else ''}\n    {stage.command}", flush=True)
        start = time.perf_counter()
        arguments = [*stage.arguments, *([f"--ckpt_path={last}"] if resumes else [])]
        status = subprocess.run([sys.executable, *arguments], check=False).returncode
        if status != 0:
            sys.exit(f"Stage '{stage.name}' ended with status {status}. The command was:\n    {stage.command}")
        if not stage.output.exists():
            sys.exit(
                f"Stage '{stage.name}' ended without '{stage.output}': it was interrupted. Start the demo again and it "
                "goes on."
            )
        self.seconds[stage.name] = round(before + time.perf_counter() - start, 1)
        self._remember(stage.name, fingerprint=fingerprint, done=True, seconds=self.seconds[stage.name])

    def _remember(self, name: str, **entry: Any) -> None:
        known = self._read() | {name: entry}
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / "stages.json.partial"
        partial.write_text(json.dumps(known, indent=2), encoding="utf-8")
        partial.replace(self.directory / "stages.json")

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.directory / "stages.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _newer(path: Path, moment: float) -> bool:
    """Whether a file is there and was written after a moment: an older one belongs to another run."""
    return path.exists() and path.stat().st_mtime >= moment
