"""Short runs of every stage, as a rank makes them, and the record that each leaves."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.dist.dist_data import ToyCaptions
from tests.dist.dist_shared import Witness
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.planted import Brightness
from tests.processes import GROUP_TIMEOUT
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks import WeightEMA
from datamodules import AnnotationDataModule, CaptionedImageDataModule, PromptDataModule
from flow_rl.flow.guidance import Guidance
from lightning_modules import DistillationStudent, FlowPretrain, GRPOPolicy, RewardFinetune
from flow_rl.distillation.settings import (DistillationSettings, TeacherSettings)
from flow_rl.rewards.finetune_settings import RewardObjective
from flow_rl.models.adapters import LoraSettings
from flow_rl.rl.settings import RolloutSettings
from tests.toy_policy import OBJECTIVES
from flow_rl.flow.windows import WindowSettings
from flow_rl.rewards.reading import ReadingSettings
from strategies import checkpoints, AtomicCheckpointIO, FSDP2Strategy, ReplicatedStrategy
from flow_rl.distributed.tensors import full


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fit.

    Attributes:
        stage: see `STAGES`.
        files: what the stage reads, by name.
        directory: where checkpoints go.
        record: file that rank 0 leaves its record in; other ranks add their number.
        strategy: `fsdp2`, `replicated` or `single`.
        world_size: number of ranks.
        steps: iterations in all.
        save_every: iterations between checkpoints.
        resume: checkpoint to go on from.
        module: changes of the module's arguments.
        data: changes of the data module's arguments.
        strategy_settings: changes of the strategy's arguments.
        extra: callbacks of the run, besides those of all runs.
        validate: at the end.
        witness: leave what each rank drew and asked beside the record (see `dist_shared`).
    """

    stage: str
    files: dict[str, str]
    directory: str
    record: str
    strategy: str = "fsdp2"
    world_size: int = 2
    steps: int = 3
    save_every: int = 1
    resume: str | None = None
    module: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    strategy_settings: dict[str, Any] = field(default_factory=dict)
    extra: tuple[Callback, ...] = ()
    validate: bool = False
    witness: bool = False


class Recorder(Callback):
    """Losses and the like by step, what was drawn, the weights at start and end, and the bytes that this rank held."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.found: dict[str, Any] = {"losses": {}, "samples": {}, "bytes": {}, "skipped": {}}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["start"] = _weights(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        names = ("loss", "update/loss", "update/gradient_norm", "reward/mean")
        logged = trainer.callback_metrics
        values = [float(logged[name]) for name in names if name in logged]
        self.found["losses"][trainer.global_step] = values
        self.found["skipped"][trainer.fit_loop.total_batch_idx] = pl_module.skipped
        if trainer.is_global_zero:  # as it goes on, for runs that do not reach their end
            with open(progress(self.run), "a", encoding="utf-8") as lines:
                lines.write(json.dumps([trainer.global_step, values]) + "\n")
        if isinstance(outputs, dict) and "iteration" in outputs:
            iteration = outputs["iteration"]
            mine = dict(zip(_keys(iteration), torch.cat(iteration.latents).cpu(), strict=True))
            self.found["samples"][trainer.global_step] = mine
        if "gradient" not in self.found:
            self.found["gradient"] = _first_moments(trainer)
            self.found["bytes"] = self._bytes(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._gradients = sum(_local_bytes(p.grad) for p in _trained(trainer) if p.grad is not None)

    def _bytes(self, trainer: Trainer) -> dict[str, int]:
        state = [v for values in _optimizer(trainer).state.values() for v in values.values() if v.ndim]
        bank = getattr(trainer.lightning_module, "bank", None)
        teachers = {} if bank is None else {"teacher": bank.slot.bytes_on_device, "teachers waiting": bank.slot.bytes_waiting}
        return teachers | {
            "parameters": sum(map(_local_bytes, _trained(trainer))),
            "gradients": self._gradients,
            "optimizer": sum(map(_local_bytes, state)),
        }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # also if nothing was left to train
        averages = [c.shadow for c in trainer.callbacks if isinstance(c, WeightEMA)]
        self.found["weights"] = _weights(pl_module)
        self.found["ema"] = {n: full(p).clone() for n, p in averages[0].state_dict().items()}
        self.found["validation"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.found["moments"] = _first_moments(trainer)
        suffix = "" if trainer.global_rank == 0 else f".{trainer.global_rank}"
        torch.save(self.found, self.run.record + suffix)


def _keys(iteration: Any) -> list[tuple]:
    """(prompt id, member) of every sample."""
    seen: dict[int, int] = {}
    keys = []
    for group in iteration.groups.tolist():
        seen[group] = seen.get(group, -1) + 1
        keys.append((group, seen[group]))
    return keys


def _weights(module: LightningModule) -> dict[str, Tensor]:
    """What is trained, whole; every rank must ask."""
    return {n: full(p.detach()).clone() for n, p in module.named_parameters() if p.requires_grad}


def _optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    return trainer.optimizers[0]


def _trained(trainer: Trainer) -> list[Tensor]:
    return [p for group in _optimizer(trainer).param_groups for p in group["params"]]


def _first_moments(trainer: Trainer) -> list[Tensor]:
    """Adam's first moments: after one step, a tenth of the clipped gradient."""
    state = _optimizer(trainer).state
    return [full(state[p]["exp_avg"]).clone() for p in _trained(trainer) if p in state]


def _local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def strategy(run: Run) -> dict[str, Any]:
    """The trainer's arguments that say how a run is spread."""
    if run.strategy == "single":
        return {"devices": 1, "plugins": [AtomicCheckpointIO()]}
    kind = {"fsdp2": FSDP2Strategy, "replicated": ReplicatedStrategy}[run.strategy]
    settings = {"timeout": GROUP_TIMEOUT, "process_group_backend": "gloo"}
    if run.strategy == "fsdp2":
        settings["precision"] = "float32"
    made = kind(**(settings | run.strategy_settings))
    return {"devices": run.world_size, "strategy": made, "use_distributed_sampler": False}


def fit(run: Run) -> None:
    """A rank's part of a run."""
    module, data = STAGES[run.stage](run)
    # Lightning counts optimizer steps, of which an iteration of GRPO has several.
    updates = module.updates_per_step
    saver = ModelCheckpoint(
        dirpath=run.directory, every_n_train_steps=run.save_every * updates, save_top_k=-1, save_last="link"
    )
    witnesses = [Witness(run.directory)] if run.witness else []
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=run.directory,
        max_steps=run.steps * updates,
        callbacks=[WeightEMA(decay=0.6), *witnesses, *run.extra, Recorder(run), saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=None if run.validate else 0,
        val_check_interval=run.steps if run.validate else None,
        check_val_every_n_epoch=None if run.validate else 1,
        **strategy(run),
    )
    trainer.fit(module, data, ckpt_path=run.resume)
    if dist.is_initialized():
        dist.destroy_process_group()


def flow_pretrain(run: Run) -> tuple[LightningModule, LightningDataModule]:
    arguments = {
        "model_path": run.files["generator"],
        "image_size": 32,
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "caption_dropout": 0.3,
    } | run.module
    data = CaptionedImageDataModule(ToyCaptions(24), ToyCaptions(4), batch_size=6)
    return FlowPretrain(**arguments), data


def reward_finetune(run: Run) -> tuple[LightningModule, LightningDataModule]:
    arguments = {
        "model_path": run.files["vlm"],
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "rubrics": {"brightness": run.files["rubric"]},
        "reading": ReadingSettings(max_new_tokens=8),
        "objective": RewardObjective(direct_share=0.5),
    } | run.module
    files = [run.files["annotations"]]
    return RewardFinetune(**arguments), AnnotationDataModule(files, files, batch_size=8)


def grpo(run: Run, kind: str = "clipped", **rollout: Any) -> tuple[LightningModule, LightningDataModule]:
    settings = {
        "num_steps": 3,
        "group_size": 2,
        "guidance": Guidance(scale=2.5, low=0.6),
        "transition": "ode" if kind == "nft" else "flow_sde",
        "window": WindowSettings(count=2, fraction=1.0),
        "batch_size": 2,  # one group at a time, with one rank as with two: what is drawn is the same to the bit
        "allow_coarse_guidance": True,
    } | rollout
    arguments = {
        "model_path": run.files["generator"],
        "image_size": 32,
        "rewards": {"brightness": Brightness()},
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "rollout": RolloutSettings(**settings),
        "objective": OBJECTIVES[kind](micro_batch_size=4, updates=2),
    } | run.module
    prompts = {name: run.files[name] for name in ("train_file", "validation_file", "test_file")}
    return GRPOPolicy(**arguments), PromptDataModule(**prompts, **({"prompts_per_step": 2} | run.data))


def student(run: Run) -> tuple[LightningModule, LightningDataModule]:
    arguments = {
        "model_path": run.files["generator"],
        "image_size": 32,
        "teachers": {"t2i": TeacherSettings(guidance=Guidance(scale=2.5, low=0.6))},
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "distillation": DistillationSettings(num_steps=3, batch_size=1, micro_batch_size=4),
    } | run.module
    prompts = {name: run.files[name] for name in ("train_file", "validation_file", "test_file")}
    return DistillationStudent(**arguments), PromptDataModule(**prompts, **({"prompts_per_step": 4} | run.data))


STAGES = {"student": student, "clipped": grpo, "nft": partial(grpo, kind="nft"), "flow_pretrain": flow_pretrain, "reward_finetune": reward_finetune}
LORA = LoraSettings(rank=4, alpha=8)


def progress(run: Run) -> str:
    """File of the losses so far, a line a step."""
    return run.record + ".jsonl"


class CrashInSave(Callback):
    """The process that comes first to a function of the save, after a step, is gone at once."""

    def __init__(self, step: int, function: str) -> None:
        self.step, self.function = step, function

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            place, _, name = self.function.rpartition(".")
            setattr(checkpoints.dcp if place else checkpoints, name, lambda *a, **k: os._exit(17))


class NotFinite(Callback):
    """One rank's loss is NaN in some iterations."""

    def __init__(self, rank: int, iterations: tuple[int, ...]) -> None:
        self.rank, self.iterations = rank, iterations

    def on_train_start(self, trainer: Trainer, pl_module: GRPOPolicy) -> None:
        loss = pl_module.objective.loss

        def poisoned(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
            value, metrics = loss(*args, **kwargs)
            bad = trainer.global_rank == self.rank and pl_module.iteration in self.iterations
            return value * (float("nan") if bad else 1.0), metrics

        pl_module.objective.loss = poisoned


def losses(path: str | Path) -> dict[int, list[float]]:
    return torch.load(path, weights_only=False)["losses"]
