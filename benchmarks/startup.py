"""What a start costs: CPU seconds of the commands that only answer, and of a run up to its first training step.

    python -m benchmarks.startup [--rounds 5] [--commands "train.py --help"]

Every command is a process of its own on one core; CPU seconds (user and system) hardly depend on what else runs. Each
command runs once to fill the caches of files and of byte code, and then as often as asked. A run's first
step is the first batch of rollouts, rewards and updates; it is timed where it begins and where it ends.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

TEACHER = "--config=configs/demo/t2i_teacher.yaml"
DEMO = f"train.py fit {TEACHER} --config=configs/demo/verifier_rewards.yaml --callbacks.stop=benchmarks.startup"
COMMANDS = {
    "import torch": "-c import_torch",
    "train.py --help": "train.py --help",
    "train.py fit --help": "train.py fit --help",
    "fit --print_config, demo": f"train.py fit {TEACHER} --print_config",
    "demo, first step begins": f"{DEMO}.AtStart",
    "demo, first step ends": f"{DEMO}.AtEnd",
}
HEADER = "| command | CPU s, median | CPU s, lowest to highest | wall s, median | runs |\n|---|---|---|---|---|"


class AtStart(Callback):
    """Ends the process where the first training step begins."""

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        os._exit(0)


class AtEnd(Callback):
    """Ends the process where the first training step has ended."""

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        os._exit(0)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one process cost, in seconds."""

    cpu: float
    wall: float


def cost(command: str, folder: Path) -> Cost:
    """Run a command once.

    Args:
        command: arguments of the interpreter; a run writes into `folder`.
        folder: for its output.

    Raises:
        RuntimeError: it failed.
    """
    words = ["-c", "import torch"] if command == "-c import_torch" else command.split()
    if "callbacks.stop" in command:
        words += [f"--run.dir={folder}", f"--run.name=r{time.monotonic_ns()}", "--callbacks.progress=null"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return Cost(cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall=wall)


def row(name: str, costs: list[Cost]) -> str:
    """A Markdown table row: medians and the spread."""
    cpu = [c.cpu for c in costs]
    wall = statistics.median(c.wall for c in costs)
    return f"| {name} | {statistics.median(cpu):.2f} | {min(cpu):.2f} to {max(cpu):.2f} | {wall:.2f} | {len(cpu)} |"


def main() -> None:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1.")
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.commands:
            _, *costs = (cost(COMMANDS[name], Path(folder)) for _ in range(args.rounds + 1))
            print(row(name, costs), flush=True)


if __name__ == "__main__":
    main()
