"""What a run would replace, and whether its outputs have room: looked at before training."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from callbacks.written_images import WritesImages
from flow_rl.errors import SettingError
from flow_rl.files import nearest_existing, why_not_ours, why_unwritable
from flow_rl.planning.setup import Setup
from lightning_modules.base import TrainedModule


def problems_of_outputs(setup: Setup) -> Iterator[str]:
    """Folders that the run replaces whole, and that are something else as well."""
    if setup.trainer.get("fast_dev_run"):
        return
    for checkpoint in setup.checkpoints:
        if checkpoint.dirpath and (why := why_unwritable(checkpoint.dirpath)):
            yield f"ModelCheckpoint.dirpath '{checkpoint.dirpath}': {why}. Choose another folder."
    replaced = [Path(path) for demands in setup.demands for path in demands.replaces]
    kept = [("the run's folder", Path(setup.run_directory))]
    kept += [("the run's checkpoints", Path(c.dirpath)) for c in setup.checkpoints if c.dirpath]
    for number, path in enumerate(replaced):
        for what, other in [*kept, *inputs_of(setup).items()]:
            if _is_or_holds(path, other):
                yield (
                    f"The export's directory '{path}' is or holds {what} ('{other}'), which it would replace. "
                    "Export to another folder."
                )
        for other in inputs_of(setup).values():
            if other != path and _is_or_holds(other, path):
                yield f"The export's directory '{path}' lies inside '{other}', which the run reads. Export elsewhere."
        for other in replaced[:number]:
            if _is_or_holds(path, other) or _is_or_holds(other, path):
                yield f"Two exports write to '{other}' and '{path}': each would replace the other. Give each a folder."
        if why := why_not_ours(path):
            yield f"The export would replace a folder: {why}. Export to a new folder, or move that one away."
        elif why := why_unwritable(path.parent):
            yield f"The export can't be written to '{path}': {why}. Export to another folder."


def inputs_of(setup: Setup) -> dict[str, Path]:
    """Folders of models that the run reads, by what they are to it."""
    found: dict[str, Any] = {"model.model_path": getattr(setup.model, "model_path", None)}
    for task, teacher in setup.profile.teachers.items():
        found |= {f"model.teachers.{task}.path": teacher.path, f"model.teachers.{task}.adapter": teacher.adapter}
    scorers: Mapping[str, Any] = {**setup.profile.rewards, **(setup.profile.monitors or {})}
    found |= {f"the model of reward '{name}'": getattr(reward, "path", None) for name, reward in scorers.items()}
    return {what: Path(path) for what, path in found.items() if path is not None and Path(path).exists()}


def _is_or_holds(folder: Path, other: Path) -> bool:
    return Path(os.path.realpath(other)).is_relative_to(os.path.realpath(folder))


class RoomOnDisk(Callback):
    """Refuses to begin a run whose checkpoints, exports and images the disk has no room for."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("test", "predict") and trainer.is_global_zero and not trainer.fast_dev_run:
            _check_disks(image_bytes(trainer, pl_module, stage))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run and isinstance(pl_module, TrainedModule):
            check_room(trainer, pl_module)


def check_room(trainer: Trainer, module: TrainedModule) -> None:
    """Compare what a run will write with what the disks take.

    Args:
        trainer: with its callbacks.
        module: with its weights and its optimizer.

    Raises:
        SettingError: a disk without room, or a limit on the size of a file.
    """
    checkpoint = checkpoint_bytes(module)
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    needed: dict[str, int] = {}
    for keeper in keepers:
        copies = max(1, keeper.save_top_k) + 1 + (keeper.save_last is True)  # the newest is written before one goes
        needed[str(keeper.dirpath)] = needed.get(str(keeper.dirpath), 0) + copies * checkpoint
    export = sum(p.numel() * p.element_size() for p in module.parameters())
    for callback in trainer.callbacks:
        demands = getattr(callback, "demands", None)
        for folder in demands().replaces if demands is not None else ():
            needed[str(folder)] = export
    for place, size in image_bytes(trainer, module, "fit").items():
        needed[place] = needed.get(place, 0) + size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    whole = not getattr(trainer.strategy, "_save_distributed_checkpoint", False)
    if keepers and whole and limit != resource.RLIM_INFINITY and checkpoint > limit:
        raise SettingError(
            f"A checkpoint ('{keepers[0].dirpath}/*.ckpt') needs {_size(checkpoint)}, and this process may write files "
            f"of {_size(limit)} at most (`ulimit -f`). Raise that limit."
        )
    _check_disks(needed)


def image_bytes(trainer: Trainer, module: LightningModule, stage: str) -> dict[str, int]:
    """Bytes by folder of the images that the callbacks of a run will write."""
    needed: dict[str, int] = {}
    for callback in trainer.callbacks:
        if isinstance(callback, WritesImages):
            for folder, size in callback.image_bytes(trainer, module, stage).items():
                needed[str(folder)] = needed.get(str(folder), 0) + size
    return needed


def _check_disks(needed: Mapping[str, int]) -> None:
    on_disk: dict[int, list[str]] = {}
    for folder in needed:
        on_disk.setdefault(nearest_existing(folder).stat().st_dev, []).append(folder)
    for folders in on_disk.values():
        total = sum(needed[folder] for folder in folders)
        free = shutil.disk_usage(nearest_existing(folders[0])).free
        if total > free:
            listed = ", ".join(f"'{folder}' {_size(needed[folder])}" for folder in folders)
            raise SettingError(
                f"The run's outputs need {_size(total)} ({listed}), and the disk has {_size(free)} free. Free space, "
                "set --run.dir to a larger disk, or write less: ModelCheckpoint.save_top_k, ImageWriter.members, "
                "SampleGrids.per_category."
            )


def checkpoint_bytes(module: TrainedModule) -> int:
    """Size of one checkpoint: trained weights, states of the optimizer, average, old policy and reference."""
    trained = [p for p in module.parameters() if p.requires_grad]
    own = sum(p.numel() * p.element_size() for p in trained)
    names = ("average", "old", "reference")
    copies = sum(bool(shadow.state_dict()) for n in names if (shadow := getattr(module, n, None)) is not None)
    return own * (1 + copies) + optimizer_state_bytes(module, trained)


def optimizer_state_bytes(module: TrainedModule, trained: list[torch.nn.Parameter]) -> int:
    """Size of an optimizer's states, read from one step on a weight of 4,096 numbers."""
    probe = torch.nn.Parameter(torch.zeros(64, 64))
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer = module.make_optimizer([probe])
        optimizer.step()
    except Exception:  # an optimizer that works on a GPU alone: as AdamW
        return sum(2 * p.numel() * p.element_size() for p in trained)
    held = sum(t.numel() * t.element_size() for t in optimizer.state[probe].values() if torch.is_tensor(t))
    return int(held / probe.numel() * sum(p.numel() for p in trained))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
