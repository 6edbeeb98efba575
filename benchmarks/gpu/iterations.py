"""Part C: whole iterations of GRPO at real size, through Lightning's trainer, in order of value."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningDataModule, LightningModule, Trainer

from benchmarks.gpu.bench import Bench, Check, Row, Value, gb
from benchmarks.gpu.demo_stages import SPLITS, edit_files, write_lines
from benchmarks.gpu.machine import ceiling, rates
from benchmarks.gpu.naive import naive
from benchmarks.gpu.policies import LORA, LORA_64, planned, planned_peak_gb, policy, random_weights
from benchmarks.gpu.random_model import scale_of
from datamodules import EditPairDataModule, PromptDataModule
from lightning_modules import GRPOPolicy
from strategies import FSDP2Strategy

ITERATIONS = 2
#: GB that may come and go between the ends of two iterations
SLACK_GB = 0.05
#: memory from which all weights can be trained: float32 masters, gradients and Adam's moments are 112 GB
FULL_FROM = 130e9


class IterationWatch(Callback):
    """Seconds, operations and memory of every iteration."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.found: list[dict[str, Value]] = []
        self._flops: Counter[str] = Counter()
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def count(flops: float) -> None:
            self._flops[pl_module.clock.current] += flops

        pl_module.model.on_flops = count

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._flops.clear()
        self.bench.synchronize()
        self.bench.reset_peak()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.bench.synchronize()
        total = time.perf_counter() - self._start
        spent, images = pl_module.clock.drain()
        values: dict[str, Value] = {"seconds": total, "images_per_s": images / total}
        values |= {f"{phase}_s": taken for phase, taken in spent.items()}
        for phase in ("rollout", "update"):
            if self._flops[phase] and spent.get(phase):
                made = rates(self.bench, self._flops[phase], spent[phase])
                values |= {f"{phase}_{name}": value for name, value in made.items()}
        values |= {f"whole_{name}": value for name, value in rates(self.bench, self._flops.total(), total).items()}
        values |= {"held_gb": gb(self.bench.allocated()), **self.bench.peaks(), "skipped": pl_module.skipped}
        self.found.append(values)


def t2i_data(bench: Bench) -> LightningDataModule:
    """One prompt an iteration."""
    files = {}
    for number, split in enumerate(SPLITS):
        rows = [{"id": 8 * number + i, "prompt": f"prompt {i}", "category": "any"} for i in range(8)]
        files[f"{split}_file"] = write_lines(bench.directory / "prompts" / f"{split}.jsonl", rows)
    return PromptDataModule(**files, prompts_per_step=1)


def edit_data(bench: Bench) -> LightningDataModule:
    """One edit an iteration."""
    size = scale_of(bench).size
    files = edit_files(bench.directory / f"edits_{size}", size, (("make it red", "any"),))
    return EditPairDataModule(image_size=size, prompts_per_step=1, **files)


def iterate(
    bench: Bench, module: GRPOPolicy, *, edit: bool = False, dtype: torch.dtype | None = None, **trainer: Any
) -> Iterator[Row]:
    """Two iterations: what each took, and that the second holds no more memory than the first.

    Args:
        bench: where.
        module: whose model is replaced by one with random weights.
        edit: one edit an iteration instead of a prompt.
        dtype: of the transformer's weights; None takes the scale's.
        **trainer: further arguments of the trainer.
    """
    bench.forget("model")
    ceiling(bench)  # not inside an iteration
    plan = planned(bench, module, edit=edit)
    module.clock.follow(bench.device)
    watch = IterationWatch(bench)
    made = Trainer(
        accelerator="gpu" if bench.cuda else "cpu", devices=1, max_steps=ITERATIONS, callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, default_root_dir=bench.directory, **trainer,
    )  # fmt: skip
    try:
        with random_weights(bench, dtype):
            made.fit(module, edit_data(bench) if edit else t2i_data(bench))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    first = watch.found[0]["held_gb"]
    for number, values in enumerate(watch.found, start=1):
        held = values["held_gb"]
        grown = None if number == 1 or not bench.cuda else held - first
        limits = {"skipped": 0} | ({} if grown is None else {"grown_gb": SLACK_GB})
        yield Row(
            name=f"iteration {number}",
            values={**values, "grown_gb": grown, "planned_peak_gb": planned_peak_gb(plan)},
            limits=limits,
        )


def lora_long(bench: Bench) -> Iterator[Row]:
    """The paper's rollout: guidance 4, two trained steps."""
    yield from iterate(bench, policy(scale_of(bench), lora=LORA))


def lora_short(bench: Bench) -> Iterator[Row]:
    """The published comparison's rollout: an adapter of rank 64, guidance 4, 10 steps, two trained."""
    scale = scale_of(bench)
    yield from iterate(bench, policy(scale, steps=scale.short_steps, lora=LORA_64))


def lora_unguided(bench: Bench) -> Iterator[Row]:
    """The same without guidance."""
    scale = scale_of(bench)
    yield from iterate(bench, policy(scale, steps=scale.short_steps, guidance=1.0, lora=LORA_64))


def nft(bench: Bench) -> Iterator[Row]:
    """DiffusionNFT with an old policy and a reference."""
    scale = scale_of(bench)
    yield from iterate(bench, policy(scale, kind="nft", steps=scale.short_steps))


def edit(bench: Bench) -> Iterator[Row]:
    """Edits: the source's keys and values are part of the prefix."""
    scale = scale_of(bench)
    yield from iterate(bench, policy(scale, steps=scale.short_steps, micro_batch=2), edit=True)


def full(bench: Bench) -> Iterator[Row]:
    """All weights, float32 masters and bfloat16 compute, without guidance; for devices with 140 GB."""
    scale, capacity = scale_of(bench), bench.capacity()
    if capacity is not None and capacity < FULL_FROM:
        yield Row(name="left out", values={"needs_gb": FULL_FROM / 1e9, "has_gb": capacity / 1e9})
        return
    module = policy(scale, steps=scale.short_steps, guidance=1.0, lora=None, micro_batch=2, checkpointing=True)
    precision = "float32" if bench.tiny else "bfloat16"
    strategy = FSDP2Strategy(precision=precision)
    yield from iterate(bench, module, dtype=torch.float32, strategy=strategy, use_distributed_sampler=False)


CHECKS = (
    Check(name="lora_long", question="GRPO, 16 images x 40 steps, guidance 4, LoRA.", run=lora_long, seconds=150),
    Check(name="lora_short", question="GRPO, 16 images x 10 steps, guidance 4, LoRA of rank 64.", run=lora_short,
          seconds=60),
    Check(name="naive", question="How much slower is a naive loop?", run=naive, seconds=60),
    Check(name="edit", question="GRPO on edits, 16 images x 10 steps, guidance 4, LoRA.", run=edit, seconds=70),
    Check(name="nft", question="DiffusionNFT, 16 images x 10 steps, guidance 4, LoRA.", run=nft, seconds=60),
    Check(name="lora_unguided", question="GRPO, 16 images x 10 steps, no guidance, LoRA of rank 64.",
          run=lora_unguided, seconds=45),
    Check(name="full", question="GRPO, 16 images x 10 steps, no guidance, all weights.", run=full, seconds=90),
)  # fmt: skip
