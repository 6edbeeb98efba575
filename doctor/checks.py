"""What cannot work although each setting by itself can: refused before anything is loaded.

The constructors of modules and datamodules have refused their own by now; these checks see several of them, the
trainer and the machine at once. Every message says what to change.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from callbacks import RewardRangeFilter
from doctor.setup import Setup
from doctor.weights import Components, count, optimizer_bytes, trained
from doctor.workload import edits, tasks
from models.loading import FAMILIES, check_model_path
from models.qwen_image import QwenImage
from strategies.checks import why_unshardable

#: pipelines that take no source image
TEXT_ONLY = "QwenImagePipeline"


def problems(setup: Setup) -> list[str]:
    """Everything that is wrong, in sentences; empty where nothing is. Nothing is built to find it out."""
    checks = CHECKS if setup.stage == "fit" else [check for check in CHECKS if check not in OF_TRAINING]
    return [message for check in checks for message in check(setup)]


def _parts(setup: Setup) -> list[tuple[str, Any]]:
    """The datamodule of each task, with the name of its settings."""
    parts = tasks(setup.data)
    return [("data" if len(parts) == 1 else f"data.{task}", part) for task, part in parts.items()]


def _ranks_share_prompts(setup: Setup) -> Iterator[str]:
    for where, part in _parts(setup):
        prompts = part.prompts_per_step
        if prompts % setup.ranks:
            near = max(1, round(prompts / setup.ranks)) * setup.ranks
            yield (
                f"{where}.prompts_per_step is {prompts}, which {setup.ranks} ranks cannot share evenly. Set it to "
                f"{near}, or change trainer.devices and trainer.num_nodes."
            )


def _sizes_agree(setup: Setup) -> Iterator[str]:
    ours = getattr(setup.model, "image_size", None)
    for where, part in _parts(setup):
        theirs = getattr(part, "image_size", None)
        if ours is not None and theirs is not None and ours != theirs:
            yield (
                f"model.image_size is {ours} and {where}.image_size {theirs}: source images would have another size "
                "than those made of them. Set both alike."
            )


def _task_fits_checkpoint(setup: Setup) -> Iterator[str]:
    path = getattr(setup.model, "model_path", None)
    if path is None or not hasattr(setup.model, "image_size") or setup.data is None:
        return
    pipeline = check_model_path(path)
    if FAMILIES[pipeline] is QwenImage and len(tasks(setup.data)) > 1:
        yield (
            f"model.model_path '{path}' is a {pipeline}, which knows one task, but the data are for "
            f"{' and '.join(tasks(setup.data))}: set model.model_path to Qwen/Qwen-Image-2.1, or use the datamodule of "
            "one task."
        )
    elif FAMILIES[pipeline] is QwenImage and edits(setup.data) == (pipeline == TEXT_ONLY):
        task, wanted = ("editing", "Edit-2509") if edits(setup.data) else ("text-to-image", "")
        wanted = "-".join(filter(None, ("Qwen/Qwen-Image", wanted)))
        yield (
            f"model.model_path '{path}' is a {pipeline}, but the data are for {task}"
            f": set model.model_path to {wanted}, or use the datamodule of the other task."
        )


def _rewards_fit_task(setup: Setup) -> Iterator[str]:
    if setup.data is None or edits(setup.data) or not hasattr(setup.data, "prompts_per_step"):
        return
    weights = getattr(setup.model, "reward_weights", None) or {}
    if any(isinstance(value, dict) for value in weights.values()):
        return  # by task: each reward is asked about its own
    for name, reward in getattr(setup.model, "rewards", {}).items():
        if getattr(getattr(reward, "rubric", None), "task", None) == "edit":
            yield (
                f"model.rewards.{name} judges edits, but the data have no source images: use "
                "datamodules.EditPairDataModule, or a rubric for text-to-image."
            )


def _guidance_fits_family(setup: Setup) -> Iterator[str]:
    rollout, path = getattr(setup.model, "rollout_settings", None), getattr(setup.model, "model_path", None)
    guided = {} if rollout is None else {"model.rollout": rollout.guidance}
    guided |= {f"model.teachers.{t}": teacher.guidance for t, teacher in getattr(setup.model, "teachers", {}).items()}
    for where, guidance in guided.items():
        rescales = FAMILIES[check_model_path(path)] is QwenImage
        if guidance.scale != 1 and rescales != guidance.rescale:
            yield (
                f"{where}.guidance.rescale is {str(guidance.rescale).lower()}, but diffusers "
                f"{'rescales' if rescales else 'does not rescale'} the guidance of '{path}': what is trained would not "
                f"be what is sampled later. Set it to {str(rescales).lower()}."
            )


def _teachers_are_there(setup: Setup) -> Iterator[str]:
    for task, teacher in getattr(setup.model, "teachers", {}).items():
        where = f"model.teachers.{task}"
        if teacher.path is not None:
            try:
                check_model_path(teacher.path)
            except ValueError as error:
                yield f"{where}: {error} Train that teacher first; callbacks.ExportModel writes it."
        if teacher.adapter is not None and not Path(teacher.adapter).is_dir():
            yield (
                f"{where}: no adapter at '{teacher.adapter}'. Train that teacher first; callbacks.ExportAdapter writes "
                "it."
            )


def _curated_scores_are_there(setup: Setup) -> Iterator[str]:
    for callback in setup.callbacks:
        if isinstance(callback, RewardRangeFilter) and not callback.sample_missing:
            scores = callback.scores
            for path in scores.values() if isinstance(scores, dict) else filter(None, [scores]):
                if not Path(path).is_file():
                    yield (
                        f"RewardRangeFilter: no curated scores at '{path}'. Run train.py curate with the same config "
                        "first, or leave the filter out."
                    )


def _manual_optimization(setup: Setup) -> Iterator[str]:
    if getattr(setup.model, "automatic_optimization", True):
        return
    if setup.trainer.get("gradient_clip_val"):
        yield "trainer.gradient_clip_val has no effect on this stage: set model.gradient_clip and leave it out."
    if (accumulate := setup.trainer.get("accumulate_grad_batches") or 1) != 1:
        yield (
            f"trainer.accumulate_grad_batches is {accumulate}, which this stage does not take: it adds up "
            "micro-batches by itself. Set model.objective.micro_batch_size, and data.prompts_per_step for more prompts."
        )


def _whole_iterations(setup: Setup) -> Iterator[str]:
    updates = getattr(getattr(setup.model, "objective_settings", None), "updates", 1)
    steps = setup.trainer.get("max_steps") or -1
    if steps > 0 and steps % updates:
        yield (
            f"trainer.max_steps is {steps}: optimizer steps, of which an iteration takes model.objective.updates = "
            f"{updates}. Set it to a multiple of {updates}, such as {steps - steps % updates or updates}."
        )
    for checkpoint in setup.checkpoints:
        every = checkpoint._every_n_train_steps
        if every and every % updates:
            yield (
                f"ModelCheckpoint.every_n_train_steps is {every}, but an iteration takes {updates} optimizer steps and "
                f"is saved at its end alone. Set it to a multiple of {updates}."
            )


def _can_resume(setup: Setup) -> Iterator[str]:
    for checkpoint in setup.checkpoints:
        if not checkpoint.dirpath:
            yield (
                "ModelCheckpoint has no dirpath, so that --ckpt_path last would look into another directory after a "
                "restart. Set it to ${run.dir}/${run.name}/checkpoints."
            )
    if not setup.checkpoints and setup.trainer.get("enable_checkpointing") is not False:
        yield "No ModelCheckpoint among trainer.callbacks: an interrupted run would be lost. Add one with a dirpath."


def _precision(setup: Setup) -> Iterator[str]:
    precision = str(setup.trainer.get("precision") or "32-true")
    manual = not getattr(setup.model, "automatic_optimization", True)
    if precision.startswith("16"):
        yield (
            f"trainer.precision is {precision}: float16 overflows in these transformers. Use 32-true with a sharding "
            "strategy, which computes in bfloat16."
        )
    elif precision == "bf16-true" and manual:
        yield (
            "trainer.precision is bf16-true: weights in bfloat16 round away the small updates of reinforcement "
            "learning. Set it to 32-true; blocks compute in bfloat16 under a sharding strategy."
        )


def _quantised_optimizer(setup: Setup) -> Iterator[str]:
    make = getattr(setup.model, "make_optimizer", None)
    if make is None or setup.shards == 1:
        return
    reason = why_unshardable(make)
    if reason is not None:
        yield f"{reason} Use torch.optim.AdamW with {setup.strategy}, or one device with an adapter."


def _full_copies(setup: Setup) -> Iterator[str]:
    generates, adapted = hasattr(setup.model, "image_size"), getattr(setup.model, "lora", None) is not None
    if generates and not adapted and setup.ranks > 1 and setup.shards == 1:
        yield (
            f"{setup.ranks} ranks train all weights without a sharding strategy, each with a whole copy of weights, "
            "gradients and optimizer states. Set trainer.strategy to one that shards (docs/cluster.md), or train an "
            "adapter (model.lora)."
        )


def problems_of_disk(setup: Setup, parts: Components) -> list[str]:
    """What is wrong with the disk, once the model is built on the meta device."""
    if not setup.checkpoints:
        return []
    trains = trained(parts.transformer)
    size = 4 * count(trains) + optimizer_bytes(setup.model.make_optimizer).total(trains)
    size += 4 * count(trains) * setup.ema
    keep = max(checkpoint.save_top_k for checkpoint in setup.checkpoints)
    # The newest is written before an older one goes.
    needed = size * (max(1, keep) + 1)
    directory = Path(setup.checkpoints[0].dirpath or setup.run_directory)
    free = shutil.disk_usage(next(p for p in (directory, *directory.absolute().parents) if p.exists())).free
    if needed <= free:
        return []
    return [
        f"Checkpoints need {needed / 1e9:.0f} GB ({size / 1e9:.1f} GB each, one more while the newest is written), and "
        f"'{directory}' has {free / 1e9:.0f} GB free. Set --run.dir to a larger disk, or ModelCheckpoint.save_top_k "
        "lower."
    ]


CHECKS: tuple[Callable[[Setup], Iterator[str]], ...] = (
    _ranks_share_prompts,
    _sizes_agree,
    _task_fits_checkpoint,
    _rewards_fit_task,
    _guidance_fits_family,
    _manual_optimization,
    _whole_iterations,
    _can_resume,
    _precision,
    _quantised_optimizer,
    _full_copies,
    _teachers_are_there,
    _curated_scores_are_there,
)
#: those that have nothing to say of a run that only samples
OF_TRAINING = (
    _ranks_share_prompts,
    _teachers_are_there,
    _curated_scores_are_there,
    _manual_optimization,
    _whole_iterations,
    _can_resume,
    _quantised_optimizer,
    _full_copies,
)
