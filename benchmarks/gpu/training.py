"""Short fits on the device: every demo stage, resuming, shards, and teachers that are swapped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.demo_stages import STAGES, Built, clipped, t2i
from benchmarks.gpu.machine import tf32
from flow_rl.distributed.tensors import full
from strategies import FSDP2Strategy


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a short fit leaves.

    Attributes:
        weights: trained ones at the end, by name, whole and on the CPU.
        before: the same at the start.
        losses: of each iteration.
        skipped: updates in a row that were left out at the end.
        seconds: of everything.
    """

    weights: dict[str, Tensor]
    before: dict[str, Tensor]
    losses: list[float]
    skipped: int
    seconds: float


class _Watch(Callback):
    """Remembers weights and losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.before: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = _trained(pl_module)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        found = [trainer.callback_metrics[name] for name in ("loss", "update/loss") if name in trainer.callback_metrics]
        self.losses += [float(loss) for loss in found]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = _trained(pl_module)


def _trained(module: LightningModule) -> dict[str, Tensor]:
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return {n: full(p.detach()).to("cpu", copy=True) for n, p in named.items()}


def fit(
    bench: Bench, built: Built, *, steps: int, directory: Path | None = None, resume: Path | None = None, **trainer: Any
) -> Fitted:
    """Train for some iterations, of one optimizer step each.

    Args:
        bench: where.
        built: module and data.
        steps: iterations, those before `resume` included.
        directory: gets a checkpoint after every iteration; None writes none.
        resume: a checkpoint to continue from.
        **trainer: further arguments of the trainer, such as its strategy.
    """
    start, watch = time.perf_counter(), _Watch()
    callbacks: list[Callback] = [watch]
    if directory is not None:
        callbacks.append(ModelCheckpoint(dirpath=directory, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    made = Trainer(
        accelerator="gpu" if bench.cuda else "cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        default_root_dir=bench.directory,
        enable_checkpointing=directory is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **trainer,
    )
    module, data = built
    made.fit(module, data, ckpt_path=resume)
    return Fitted(
        weights=watch.weights,
        before=watch.before,
        losses=watch.losses,
        skipped=module.skipped,
        seconds=time.perf_counter() - start,
    )


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any weight; infinite where names differ."""
    if found.keys() != expected.keys() or not found:
        return math.inf
    return max(float((found[name].double() - expected[name].double()).abs().max()) for name in found)


def stages(bench: Bench) -> Iterator[Row]:
    """Two iterations of every stage: losses are finite, no update is left out, and weights move."""
    steps = 2
    for name, build in STAGES.items():
        with tf32(False):
            fitted = fit(bench, build(bench.directory), steps=steps)
        yield Row(
            name=name,
            values={
                "missing_losses": steps - sum(map(math.isfinite, fitted.losses)),
                "skipped": fitted.skipped,
                "unmoved": int(not distance(fitted.weights, fitted.before) > 0),
                "first_loss": fitted.losses[0] if fitted.losses else None,
                "seconds": fitted.seconds,
            },
            limits={"missing_losses": 0, "skipped": 0, "unmoved": 0},
        )
        bench.clean()


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, operations are repeatable where torch can make them so; it warns of the others."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def resume(bench: Bench) -> Iterator[Row]:
    """A run that was stopped and resumed against one that never was, and two equal runs beside it.

    Bitwise in torch's deterministic mode; without it, the distance of two equal runs says what to expect.
    """
    first = bench.directory / "resumed"
    for build, name in ((clipped, "clipped, LoRA"), (t2i, "nft, all weights"))[: 1 if bench.tiny else 2]:
        for repeatable in (True,) if bench.tiny else (True, False):
            place = first / f"{build.__name__}_{repeatable}"
            with tf32(False), deterministic() if repeatable else tf32(False):
                whole = fit(bench, build(bench.directory), steps=3, directory=place)
                again = None if bench.tiny else fit(bench, build(bench.directory), steps=3)
                halfway = next(place.glob("*step=2*.ckpt"))
                resumed = fit(bench, build(bench.directory), steps=3, resume=halfway)
            yield Row(
                name=f"{name}{', deterministic' if repeatable else ''}",
                values={
                    "resumed": distance(resumed.weights, whole.weights),
                    "repeated": None if again is None else distance(again.weights, whole.weights),
                    "moved": distance(whole.weights, whole.before),
                },
                limits={"resumed": 0.0} if repeatable else {},
            )


def sharded(bench: Bench) -> Iterator[Row]:
    """FSDP2 on one rank against a run without it: weights after two iterations, relative to how far they moved."""
    build = partial(t2i, bench.directory)
    with tf32(False):
        alone = fit(bench, build(), steps=2)
        moved = distance(alone.weights, alone.before)
        for precision, offload in (("float32", False), ("float32", True), ("bfloat16", False)):
            if bench.tiny and precision == "bfloat16":
                continue  # slow on a CPU
            strategy = FSDP2Strategy(precision=precision, cpu_offload=offload)
            try:
                found = fit(bench, build(), steps=2, strategy=strategy, use_distributed_sampler=False)
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            limits = {"missing_losses": 0, "skipped": 0}
            # Adam divides by the gradient's size: where it is tiny, its rounding is not.
            limits |= {"share_off": 0.01} if precision == "float32" else {}
            yield Row(
                name=f"{precision}{', offload' if offload else ''}",
                values={
                    "distance": distance(found.weights, alone.weights),
                    "share_off": share_off(found.weights, alone.weights, 0.01 * moved),
                    "missing_losses": 2 - sum(map(math.isfinite, found.losses)),
                    "skipped": found.skipped,
                    "seconds": found.seconds,
                },
                limits=limits,
            )
            bench.clean()


def share_off(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> float:
    """Share of the weights that differ by more than a tolerance."""
    if found.keys() != expected.keys():
        return math.inf
    off = sum(int(((found[n] - expected[n]).abs() > tolerance).sum()) for n in found)
    return off / sum(tensor.numel() for tensor in found.values())
