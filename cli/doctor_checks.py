"""What cannot work although each setting by itself can: refused before anything is loaded.

The constructors of modules and datamodules have refused their own by now; these checks see several of them, the
trainer and the machine at once. Every message says what to change.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cli.callback_checks import problems_of_callbacks
from cli.data_checks import prompts_fit_generator
from cli.output_checks import problems_of_outputs
from cli.trainer_arguments import problems_of_trainer
from datamodules.stream import StreamedDataModule
from flow_rl.batches import TaskPrompts
from flow_rl.distributed.optimizers import why_unshardable
from flow_rl.models.loading import FAMILIES, check_model_path
from flow_rl.models.qwen_image import QwenImage
from flow_rl.planning.setup import Setup
from flow_rl.planning.weights import Components, count, optimizer_bytes, trained

#: pipelines that take no source image
TEXT_ONLY = "QwenImagePipeline"
#: a whole copy of weights, gradients and optimizer states above this leaves no room on a device of 80 GB
LARGEST_COPY = 60 * 10**9

#: largest share of the weights from before training in the average that is exported
LARGEST_START = 0.1
#: optimizer steps of a run that tries whether things work: nobody takes its export for a trained model
TRIAL_STEPS = 5

Check = Callable[[Setup], Iterator[str]]


def problems(setup: Setup) -> list[str]:
    """Everything that is wrong, in sentences; empty where nothing is. Nothing is built to find it out."""
    return _found(setup, CHECKS)


def faults(setup: Setup) -> list[str]:
    """What every run is refused for at its start: it would fail later, or compute something else than it says.

    The rest of `problems` is about losing work or money, and whoever starts a run may have their reasons.
    """
    return _found(setup, FAULTS)


def problems_of_files(setup: Setup) -> list[str]:
    """Which teachers and curated scores are missing. A plan can be made without them."""
    return _found(setup, FILES)


def _trainer_arguments(setup: Setup) -> Iterator[str]:
    yield from problems_of_trainer(setup)


def _callbacks(setup: Setup) -> Iterator[str]:
    yield from problems_of_callbacks(setup)


def _found(setup: Setup, checks: Sequence[Check]) -> list[str]:
    chosen = checks if setup.stage == "fit" else [check for check in checks if check not in OF_TRAINING]
    return [message for check in chosen for message in check(setup)]


def _parts(setup: Setup) -> list[tuple[str, TaskPrompts]]:
    """The datamodule of each task, with the name of its settings."""
    parts = setup.tasks
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
    generator = setup.profile.generator
    for where, part in _parts(setup):
        theirs = part.image_size
        if generator is not None and theirs is not None and generator.image_size != theirs:
            yield (
                f"model.image_size is {generator.image_size} and {where}.image_size {theirs}: source images would have "
                "another size than those made of them. Set both alike."
            )


def _task_fits_checkpoint(setup: Setup) -> Iterator[str]:
    if setup.profile.generator is None or setup.data is None:
        return
    path = setup.profile.generator.model_path
    pipeline, edits = check_model_path(path), "edit" in setup.tasks
    if FAMILIES[pipeline] is QwenImage and len(setup.tasks) > 1:
        yield (
            f"model.model_path '{path}' is a {pipeline}, which knows one task, but the data are for "
            f"{' and '.join(setup.tasks)}: set model.model_path to Qwen/Qwen-Image-2.1, or use the datamodule of "
            "one task."
        )
    elif FAMILIES[pipeline] is QwenImage and edits == (pipeline == TEXT_ONLY):
        task, wanted = ("editing", "Edit-2509") if edits else ("text-to-image", "")
        wanted = "-".join(filter(None, ("Qwen/Qwen-Image", wanted)))
        yield (
            f"model.model_path '{path}' is a {pipeline}, but the data are for {task}"
            f": set model.model_path to {wanted}, or use the datamodule of the other task."
        )


def _rewards_fit_task(setup: Setup) -> Iterator[str]:
    asked = setup.profile.trained_on.get("t2i", ()) if "t2i" in setup.tasks else ()
    for name, reward in setup.profile.rewards.items():
        if reward.judges_edits and name in asked:
            yield (
                f"model.rewards.{name} judges edits, but is asked about prompts without source images: use "
                "datamodules.EditPairDataModule, a rubric for text-to-image, or weights by task (model.reward_weights)."
            )


def _guidance_fits_family(setup: Setup) -> Iterator[str]:
    for setting, guidance in setup.profile.guidances.items():
        path, where = setup.generator.model_path, setting.removesuffix(".scale")
        rescales = FAMILIES[check_model_path(path)] is QwenImage
        if guidance.scale != 1 and rescales != guidance.rescale:
            yield (
                f"{where}.rescale is {str(guidance.rescale).lower()}, but diffusers "
                f"{'rescales' if rescales else 'does not rescale'} the guidance of '{path}': what is trained would not "
                f"be what is sampled later. Set it to {str(rescales).lower()}."
            )


def _teachers_are_there(setup: Setup) -> Iterator[str]:
    for task, teacher in setup.profile.teachers.items():
        where = f"model.teachers.{task}"
        if teacher.path is not None:
            try:
                check_model_path(teacher.path)
            except ValueError as error:
                yield f"{where}: {error} Train that teacher first; callbacks.ExportModel writes it."
        if teacher.adapter is not None and not Path(teacher.adapter).exists():
            yield (
                f"{where}: no adapter at '{teacher.adapter}'. Train that teacher first; callbacks.ExportAdapter writes "
                "it."
            )


def _files_of_callbacks_are_there(setup: Setup) -> Iterator[str]:
    for demands in setup.demands:
        yield from demands.missing


def _manual_optimization(setup: Setup) -> Iterator[str]:
    if not setup.profile.manual:
        return
    if (accumulate := setup.trainer.get("accumulate_grad_batches") or 1) != 1:
        yield (
            f"trainer.accumulate_grad_batches is {accumulate}, which this stage does not take: it adds up "
            "micro-batches by itself. Set model.objective.micro_batch_size, and data.prompts_per_step for more prompts."
        )


def _whole_iterations(setup: Setup) -> Iterator[str]:
    updates = setup.profile.updates
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


def _takes_steps(setup: Setup) -> Iterator[str]:
    for name in ("max_steps", "max_epochs"):
        if setup.trainer.get(name) == 0:
            yield f"trainer.{name} is 0: nothing would be trained. Set it above 0; -1 goes on without end."


def _average_leaves_start(setup: Setup) -> Iterator[str]:
    steps, updates = setup.trainer.get("max_steps") or -1, setup.profile.updates
    if steps <= TRIAL_STEPS or setup.trainer.get("fast_dev_run"):
        return
    for average in setup.averages:
        share = average.share_of_start(steps // updates, updates)
        if share > LARGEST_START:
            yield (
                f"After trainer.max_steps = {steps}, {share:.0%} of the {average.name} of the weights would be what "
                "they were before training, and that average is what is validated and exported. "
                f"{average.advice}, train longer, or leave the average out (--callbacks.ema=null)."
            )


def _stream_goes_on(setup: Setup) -> Iterator[str]:
    if not isinstance(setup.data, StreamedDataModule):
        return
    trainer, updates = setup.trainer, setup.profile.updates
    advice = "Set trainer.max_steps for a shorter run"
    if setup.prompts is not None:
        advice += ", and data.max_train for fewer prompts"
    if (overfit := trainer.get("overfit_batches") or 0) > 0:
        yield f"trainer.overfit_batches is {overfit}: the same batches would come for ever. Leave it out. {advice}."
    limit = trainer.get("limit_train_batches")
    if limit is None or trainer.get("fast_dev_run") or (isinstance(limit, float) and limit == 1):
        return
    steps, epochs = trainer.get("max_steps") or -1, trainer.get("max_epochs")
    batches = steps * (trainer.get("accumulate_grad_batches") or 1) / updates
    if limit == 0:
        yield f"trainer.limit_train_batches is 0: nothing would be trained. {advice}."
    elif not 0 < batches <= limit and epochs != 1:
        yield (
            f"trainer.limit_train_batches is {limit}: an epoch would end there, and the next one would begin with the "
            f"same batches, for ever, since the training data are one endless stream. Leave it out. {advice}."
        )


def _can_resume(setup: Setup) -> Iterator[str]:
    for checkpoint in setup.checkpoints:
        if not checkpoint.dirpath:
            yield (
                "ModelCheckpoint has no dirpath, so that --ckpt_path last would look into another directory after a "
                "restart. Set it to ${run.dir}/${run.name}/checkpoints."
            )
    if not setup.checkpoints and setup.trainer.get("enable_checkpointing") is not False:
        yield "No ModelCheckpoint among the callbacks: an interrupted run would be lost. Add one with a dirpath."


def _precision(setup: Setup) -> Iterator[str]:
    precision = str(setup.trainer.get("precision") or "32-true")
    if precision.startswith("16"):
        yield (
            f"trainer.precision is {precision}: float16 overflows in these transformers. Use 32-true with a sharding "
            "strategy, which computes in bfloat16."
        )
    elif precision == "bf16-true" and setup.profile.manual:
        yield (
            "trainer.precision is bf16-true: weights in bfloat16 round away the small updates of reinforcement "
            "learning. Set it to 32-true; blocks compute in bfloat16 under a sharding strategy."
        )


def _quantised_optimizer(setup: Setup) -> Iterator[str]:
    make = setup.profile.make_optimizer
    if make is None or setup.shards == 1:
        return
    reason = why_unshardable(make)
    if reason is not None:
        yield f"{reason} Use torch.optim.AdamW with {setup.strategy}, or one device with an adapter."


def problems_of_copies(setup: Setup, parts: Components) -> list[str]:
    """What is wrong with training all weights of a large model on every rank, once it is built on the meta device."""
    trains = trained(parts.transformer)
    size = 2 * 4 * count(trains) + optimizer_bytes(setup.profile.make_optimizer).total(trains)
    if setup.ranks == 1 or setup.shards > 1 or size <= LARGEST_COPY:
        return []
    return [
        f"{setup.ranks} ranks train all weights without a sharding strategy, each with a whole copy of weights, "
        f"gradients and optimizer states: {size / 1e9:.0f} GB. Set trainer.strategy to one that shards "
        "(docs/cluster.md), or train an adapter (model.lora)."
    ]


def problems_of_disk(setup: Setup, parts: Components) -> list[str]:
    """What is wrong with the disk, once the model is built on the meta device."""
    if not setup.checkpoints:
        return []
    trains = trained(parts.transformer)
    size = 4 * count(trains) + optimizer_bytes(setup.profile.make_optimizer).total(trains)
    size += 4 * count(trains) * len(setup.averages)
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


FAULTS: tuple[Check, ...] = (
    _ranks_share_prompts,
    _sizes_agree,
    _task_fits_checkpoint,
    _rewards_fit_task,
    _guidance_fits_family,
    _manual_optimization,
    _whole_iterations,
    _takes_steps,
    _average_leaves_start,
    _stream_goes_on,
    _precision,
    _quantised_optimizer,
    prompts_fit_generator,
    problems_of_outputs,
    _trainer_arguments,
    _callbacks,
)
CHECKS: tuple[Check, ...] = (*FAULTS, _can_resume)
#: files that the run needs and its plan does not
FILES: tuple[Check, ...] = (_teachers_are_there, _files_of_callbacks_are_there)
#: those that have nothing to say of a run that only samples
OF_TRAINING = (
    _ranks_share_prompts,
    _manual_optimization,
    _whole_iterations,
    _takes_steps,
    _average_leaves_start,
    _stream_goes_on,
    _quantised_optimizer,
    problems_of_outputs,
    _can_resume,
    _teachers_are_there,
    _files_of_callbacks_are_there,
)
