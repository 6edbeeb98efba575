"""Runs the demo's stages, several side by side, each again only when what it depends on has changed.

A training that was interrupted goes on from its last checkpoint, if the command and everything it reads are the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from demo.pipeline.stage_progress import StageDisplay, ending
from demo.pipeline.stages import Stage
from flow_rl.files import replace_file

_POLL = 0.5
#: seconds that stages have to end once another has failed or the user has had enough
_GRACE = 60.0


@dataclass(frozen=True, kw_only=True)
class Running:
    """A stage at work.

    Attributes:
        stage: which.
        heading: its name and place, such as "[2/20] reward".
        fingerprint: of what it reads.
        before: seconds spent on it by an earlier run, up to the checkpoint that it goes on from.
        start: when it was started, by the monotonic clock.
        process: its command.
        log: what it prints.
    """

    stage: Stage
    heading: str
    fingerprint: str
    before: float
    start: float
    process: subprocess.Popen[bytes]
    log: Path


class StageRunner:
    """Remembers, in `<directory>/stages.json`, what was done and how long it took.

    Args:
        directory: of the whole demo run.
        jobs: stages at a time. With two, each computes on half of the cores, which is faster than one after the other
            on all of them: small models don't fill many, and every start keeps one busy alone (docs/experiments.md).

    Attributes:
        seconds: wall-clock time of each stage, of this run or of the ones that did it.
    """

    def __init__(self, directory: Path, jobs: int = 1) -> None:
        assert jobs >= 1, jobs
        self.directory, self.jobs = directory, jobs
        self.seconds: dict[str, float] = {}
        self._display = StageDisplay()

    def run(self, stages: Sequence[Stage]) -> None:
        """Run every stage, go on with it, or skip it if it was done with the same inputs.

        Args:
            stages: in an order in which they could run one by one. A stage waits for those before it that make what
                it reads; of the others, the first in the list starts first.

        Raises:
            SystemExit: a command failed, and the end of its output has been shown; or another run is at work here.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        waiting = {f"[{number}/{len(stages)}] {stage.name}": stage for number, stage in enumerate(stages, start=1)}
        running: list[Running] = []
        with (self.directory / "stages.lock").open("w") as lock:
            self._own(lock)
            try:
                while waiting or running:
                    running = [job for job in running if not self._ended(job)]
                    self._start_what_can(waiting, running, lock)
                    self._display.update({job.stage.name: job.log for job in running})
                    if running:
                        time.sleep(_POLL)
            finally:
                _stop(running)

    def _own(self, lock: IO[str]) -> None:
        # Stages hold the lock as well: one that outlives a killed run is still writing here.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(
                f"A demo run, or a stage that a killed one left behind, is at work in '{self.directory}': wait for it, "
                "stop it, or choose another directory."
            )

    def _start_what_can(self, waiting: dict[str, Stage], running: list[Running], lock: IO[str]) -> None:
        unfinished = [job.stage for job in running]
        for heading, stage in list(waiting.items()):
            if len(running) == self.jobs:
                return
            if not any(stage.reads(other) for other in unfinished):
                del waiting[heading]
                job = self._start(stage, heading, lock)
                if job is None:
                    continue
                running.append(job)
            unfinished.append(stage)

    def _start(self, stage: Stage, heading: str, lock: IO[str]) -> Running | None:
        """Start a stage's command; None if there is nothing to run."""
        fingerprint = stage.fingerprint()
        entry = self._read().get(stage.name, {})
        same = entry.get("fingerprint") == fingerprint
        if same and entry.get("done") and stage.output.exists():
            self.seconds[stage.name] = entry["seconds"]
            self._display.say(f"\n{heading}: done before ({entry['seconds']:.0f} s), inputs unchanged")
            return None
        if not entry:
            _refuse_foreign(stage)
        if not same:
            _remove(stage.resumes_from)
        last = stage.checkpoints / "last.ckpt" if stage.checkpoints is not None else None
        resumes = same and not entry.get("done") and last is not None and _newer(last, entry["started"])
        if not resumes and stage.checkpoints is not None:  # a training that starts anew refuses another one's folder
            _remove(sorted(stage.checkpoints.glob("*.ckpt")))
        # What was spent up to the checkpoint counts; what came after it is done again.
        before = last.stat().st_mtime - entry["started"] + entry["seconds"] if resumes else 0.0
        self._remember(stage.name, fingerprint=fingerprint, done=False, seconds=before, started=time.time())
        self._display.say(f"\n{heading}{' (goes on)' if resumes else ''}\n    {stage.command}")
        arguments = [sys.executable, *stage.arguments, *([f"--ckpt_path={last}"] if resumes else [])]
        log = self.directory / "logs" / f"{stage.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab" if resumes else "wb") as output:
            process = subprocess.Popen(
                arguments, stdout=output, stderr=subprocess.STDOUT, env=self._environment(), pass_fds=[lock.fileno()]
            )
        return Running(
            stage=stage,
            heading=heading,
            fingerprint=fingerprint,
            before=before,
            start=time.monotonic(),
            process=process,
            log=log,
        )

    def _environment(self) -> dict[str, str]:
        """A stage always has the same number of threads, whoever else is at work: sums come out the same."""
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return dict(os.environ)
        return os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.jobs))}

    def _ended(self, job: Running) -> bool:
        """Whether a stage is over; if so, remember it."""
        status, stage = job.process.poll(), job.stage
        if status is None:
            return False
        if status != 0:
            self._display.say(ending(job.log))
            sys.exit(
                f"Stage '{stage.name}' ended with status {status}; all of its output is in '{job.log}'. The command "
                f"was:\n    {stage.command}"
            )
        if not stage.output.exists():
            sys.exit(
                f"Stage '{stage.name}' ended without '{stage.output}': it was interrupted. Start the demo again and it "
                "goes on."
            )
        spent = round(job.before + time.monotonic() - job.start, 1)
        self.seconds[stage.name] = spent
        self._remember(stage.name, fingerprint=job.fingerprint, done=True, seconds=spent)
        self._display.say(f"{job.heading}: done in {spent:.0f} s")
        return True

    def _remember(self, name: str, **entry: Any) -> None:
        known = self._read() | {name: entry}
        replace_file(self.directory / "stages.json", json.dumps(known, indent=2).encode())

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.directory / "stages.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _stop(running: Sequence[Running]) -> None:
    """End what still runs: it goes on later, trainings from their last checkpoint."""
    for job in running:
        if job.process.poll() is None:
            job.process.terminate()
    deadline = time.monotonic() + _GRACE
    for job in running:
        try:
            job.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()


def _refuse_foreign(stage: Stage) -> None:
    """Leave alone what a stage of no demo run here made: a training by hand has the same folder."""
    found = [path for path in stage.resumes_from if path.exists()]
    found += [] if stage.checkpoints is None else sorted(stage.checkpoints.glob("*.ckpt"))
    if found:
        sys.exit(
            f"Stage '{stage.name}' would replace '{found[0]}', which no demo run made. Move it away, or give the demo "
            "another --dir."
        )


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _newer(path: Path, moment: float) -> bool:
    """Whether a file is there and was written after a moment: an older one belongs to another run."""
    return path.exists() and path.stat().st_mtime >= moment
