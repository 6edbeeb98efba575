"""torchrun and train.py as a user starts them: killed workers, a launcher told to stop, a launcher killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.processes import GROUP_TIMEOUT, PATIENCE

from strategies.checkpoint_files import newest_checkpoint
from strategies.checkpoints import load_shards
from strategies.resume import OWN_STORE

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STEPS = 6


def config(files: dict[str, str], directory: Path) -> Path:
    """The run of `dist_runs.grpo` with NFT, as a file."""
    model = {
        "model_path": files["generator"],
        "image_size": 32,
        "rewards": {"brightness": {"class_path": "tests.planted.Brightness"}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        "rollout": {
            "num_steps": 3, "group_size": 2, "guidance": {"scale": 2.5, "low": 0.6}, "transition": "ode",
            "batch_size": 2, "window": {"count": 2, "fraction": 1.0},
        },
        "objective": {"class_path": "flow_rl.rl.objectives.NFT", "init_args": {"micro_batch_size": 4, "updates": 2}},
    }  # fmt: skip
    prompts = {name: files[name] for name in ("train_file", "validation_file", "test_file")}
    settings = {"precision": "float32", "timeout": GROUP_TIMEOUT, "process_group_backend": "gloo"}
    saver = {"dirpath": str(directory / "checkpoints"), "every_n_train_steps": 2, "save_top_k": -1}
    content = {
        "run": {"dir": str(directory), "name": "run", "threads": 1},
        "model": {"class_path": "lightning_modules.GRPOPolicy", "init_args": model},
        "data": {"class_path": "datamodules.PromptDataModule", "init_args": prompts | {"prompts_per_step": 2}},
        "trainer": {
            "accelerator": "cpu", "devices": 2, "max_steps": 2 * STEPS, "use_distributed_sampler": False,
            "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "strategy": {"class_path": "strategies.FSDP2Strategy", "init_args": settings},
            "callbacks": [
                {"class_path": "callbacks.WeightEMA", "init_args": {"decay": 0.6}},
                {"class_path": "callbacks.Preemption"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saver},
            ],
        },
    }  # fmt: skip
    path = directory / "config.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


class Job:
    """A torchrun with two workers."""

    def __init__(self, path: Path, *arguments: str, restarts: int = 0) -> None:
        self.checkpoints = path.parent / "checkpoints"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", OWN_STORE: "1"}
        self.log = (path.parent / "log").open("a")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "train.py", "fit", "--config", str(path), *arguments],
            cwd=ROOT, env=environment, stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def after_step(self, step: int) -> None:
        """Wait until a checkpoint of that step or a later one is complete."""
        deadline = time.monotonic() + 120 * PATIENCE
        while not any(int(p.stem.rpartition("=")[2]) >= step for p in self.checkpoints.glob("epoch*step=*.ckpt")):
            assert self.process.poll() is None, Path(self.log.name).read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def worker(self, rank: int) -> int:
        """Process id of a rank."""
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (directory / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == self.process.pid and b"LOCAL_RANK=%d" % rank in variables:
                return int(directory.name)
        raise AssertionError("no such worker")

    def end(self) -> int:
        try:
            return self.process.wait(timeout=240 * PATIENCE)
        finally:
            self.process.kill()
            self.log.close()


def under_way(files: dict[str, str], directory: Path, chance: random.Random, *, restarts: int = 0) -> Job:
    """A job some moment after its first step, several steps before its end."""
    job = Job(config(files, directory), restarts=restarts)
    job.after_step(2)
    time.sleep(chance.uniform(0, 0.5))  # at most about a step
    return job


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_preempted_and_goes_on(directory: Path, expected: dict) -> None:
    """The signal came several steps before the end: a run that simply went on leaves no such checkpoint."""
    assert list((directory / "checkpoints").glob("preempted-step=*.ckpt"))
    again = Job(directory / "config.yaml", "--ckpt_path=last")
    assert again.end() == 0
    assert_finished(directory, expected)


def assert_finished(directory: Path, expected: dict) -> None:
    newest = newest_checkpoint([directory / "checkpoints"])
    state = load_shards(newest, mesh=None)
    assert state["global_step"] == 2 * STEPS
    assert state["state_dict"].keys() == expected["weights"].keys()
    for name, weight in state["state_dict"].items():
        assert torch.equal(weight, expected["weights"][name])


@pytest.fixture
def expected(recorded) -> dict:
    """The run that nothing happens to."""
    return recorded("nft", "fsdp2", 2, steps=STEPS)


def test_a_killed_worker_is_restarted_and_the_run_ends_as_if_nothing_had_been(expected, files, repetitions, chance) -> None:
    for directory in repetitions:
        job = under_way(files, directory, chance, restarts=1)
        os.kill(job.worker(chance.randrange(2)), signal.SIGKILL)
        assert job.end() == 0
        assert_finished(directory, expected)


def test_a_launcher_told_to_stop_leaves_a_checkpoint_to_go_on_from(expected, files, repetitions, chance) -> None:
    for directory in repetitions:
        job = under_way(files, directory, chance)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() != 0
        assert_preempted_and_goes_on(directory, expected)


def test_workers_of_a_killed_launcher_stop_with_a_checkpoint(expected, files, repetitions, chance) -> None:
    for directory in repetitions:
        job = under_way(files, directory, chance)
        workers = [job.worker(rank) for rank in range(2)]
        job.process.kill()
        assert job.end() == -signal.SIGKILL
        deadline = time.monotonic() + 60 * PATIENCE
        while any(is_running(worker) for worker in workers):
            assert time.monotonic() < deadline, "orphans go on"
            time.sleep(0.05)
        assert_preempted_and_goes_on(directory, expected)
