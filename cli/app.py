"""`train.py`: a LightningCLI with what this project adds to it.

    python train.py fit --config configs/demo/t2i_teacher.yaml --config configs/objective/clipped.yaml
    python train.py validate | test | predict ... --model.model_path=...
    python train.py curate --config configs/demo/t2i_teacher.yaml --config configs/demo/curate.yaml
    python train.py doctor --config configs/qwen_image_21/grpo_t2i.yaml --fit 8xH100-80GB   (loads nothing)

Several `--config` files stack, later ones win, and the command line wins over all. `${run.dir}` and the like
are resolved last, so they see every override.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning import __version__ as lightning_version
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from callbacks.run_checkpoint import RunCheckpoint
from callbacks.stop_signals import StopSignals
from cli.complaints import TRACEBACK_VARIABLE, complain, end_bars
from cli.config_stack import expand, settings_only
from cli.errors import explain_disk, explain_instantiation, explain_parsing, refused_by_disk
from cli.literal_text import LiteralParser, finished, install
from cli.named_callbacks import built_callbacks, callback_names, refuse_mixture, wanted
from cli.named_classes import described, import_named
from cli.quiet import leave_out_advice
from cli.resumed_settings import compare_with_checkpoint
from cli.run_folder import (
    EVALUATIONS,
    check_fit,
    check_writable,
    checkpoint_folders,
    claim,
    claim_logs,
    folder_of_evaluation,
    keep_former_config,
    lock,
    redirected,
    release,
    settings_digest,
)
from cli.settings_record import RecordedSettings, plain, record_of
from cli.start_checks import check_checkpoint, check_name, check_seed
from cli.subcommands import DESCRIPTION, DOCTOR, SUBCOMMANDS, with_config
from flow_rl.curation.settings import CurationSettings
from flow_rl.errors import RunStopped, SettingError, refuse
from strategies.checkpoint_files import newest_checkpoint, sweep
from strategies.precision import allow_tf32
from strategies.resume import checkpoint_to_resume, end_with_launcher, mark_start, restarted, warning_of_restarts

#: Lightning's functions that run one batch of fit, of validate and test, and of predict
BATCH_FUNCTIONS = {"advance", "_evaluation_step", "_predict_step"}


class StrictParser(LiteralParser, LightningArgumentParser):
    """Reads files as they were written, takes callbacks by name, and remembers which file an error came from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callbacks: list[str] = []

    def add_callbacks(self, names: list[str]) -> None:
        """Take a callback of any class under each of these names."""
        self.callbacks = names
        for name in names:
            self.add_subclass_arguments(Callback, f"callbacks.{name}", fail_untyped=False, required=False)

    @override
    def settings_in(self, tree: Any) -> Any:
        return settings_only(tree, self.callbacks)

    @override
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_path(path, *args, **kwargs)
        except ArgumentError as error:
            error.config_file = str(path)
            raise


class FlowTrainer(Trainer):
    """Lightning's Trainer, and what the added subcommands run."""

    def curate(
        self, model: LightningModule, datamodule: LightningDataModule | None = None, *, curation: CurationSettings
    ) -> None:
        """Score rollouts of every training prompt, and report which prompts a threshold keeps."""
        from cli.curate import curate  # only this subcommand needs the generators' libraries by itself

        curate(self, model, datamodule, curation)


class FlowCLI(LightningCLI):
    """LightningCLI with run-wide values for interpolation and checks that come before any model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._given: list[str] = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        super().__init__(*args, **kwargs)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        own = {"predict": known["predict"] | {"return_predictions"}, "curate": {"model", "datamodule"}}
        return known | own

    def predict(self, **kwargs: Any) -> None:
        """Run `predict`: callbacks write the images, so nothing needs to keep them all in memory."""
        self.trainer.predict(**kwargs, return_predictions=False)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={lightning_version}"])
        parser: LightningArgumentParser = with_config(self.parser_class(**kwargs))
        return parser

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add every subcommand, but settings only to the one that runs: reading Lightning's classes takes a second."""
        self._subcommand_parsers: dict[str, StrictParser] = {}
        added = parser.add_subcommands()
        chosen = self._given[0] if self._given[:1] and self._given[0] in self.subcommands() else None
        for name in self.subcommands():
            if chosen in (name, None):  # behind other options it isn't known yet
                made = self._prepare_subcommand_parser(
                    self.trainer_class, name, description=described(SUBCOMMANDS[name])
                )
            else:
                made = self.init_parser()
            self._subcommand_parsers[name] = made
            added.add_subcommand(name, made, help=SUBCOMMANDS[name])
        added.add_subcommand(DOCTOR, self.init_parser(), help=SUBCOMMANDS[DOCTOR])

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run.dir", type=str, default="runs", help="where everything of this run is written")
        parser.add_argument("--run.name", type=str, default="dev", help="folder of this run under run.dir")
        parser.add_argument("--run.seed", type=int, default=0, help="of data order, noise, windows and noise levels")
        parser.add_argument("--run.threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
        parser.add_argument(
            "--run.tf32", type=bool, default=False, help="let CUDA multiply float32 matrices in TensorFloat-32"
        )

    @override
    def parse_arguments(self, parser: ArgumentParser, args: Any) -> None:
        expanded = expand(self._given)
        subcommand = next((a for a in self._given if a in self._subcommand_parsers), "fit")
        self._subcommand_parsers[subcommand].add_callbacks(callback_names(expanded))
        try:
            self._parse(parser, expanded)
        except SettingError:
            raise
        except (ArgumentError, ValueError, OmegaConfBaseException) as error:
            known = list(self._subcommand_parsers[subcommand].get_defaults().keys(branches=True))
            raise SettingError(explain_parsing(error, ["config", "print_config", *known])) from error
        if self.config.subcommand == DOCTOR:
            raise SettingError(f"{DOCTOR} comes first: train.py {DOCTOR} --config FILE.")
        finished(self.config)
        config = self.config[self.config.subcommand]
        check_name(config.run.name)
        check_seed(config.run.seed)
        refuse_mixture(config)

    def _parse(self, parser: ArgumentParser, args: list[str]) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            if not import_named(str(error)):
                raise
            super().parse_arguments(parser, args)

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self._settings = RecordedSettings()
        check_checkpoint(config.get("ckpt_path"))
        self._choose_folder(config)
        if config.trainer.min_steps is not None and config.trainer.min_epochs is None:
            config.trainer.min_epochs = 0  # Lightning's 1 would make a stop wait for the end of an endless epoch
        if config.run.threads > 0:
            torch.set_num_threads(config.run.threads)
        if config.run.tf32:
            allow_tf32()
        # Denormals make a CPU step up to a hundred times slower, and round to nothing that matters.
        torch.set_flush_denormal(True)

    def _choose_folder(self, config: Any) -> None:
        """Say where this command writes: an evaluation never among the files of another command."""
        folder = Path(config.run.dir) / config.run.name
        checkpoint = config.get("ckpt_path")
        if checkpoint == "last":
            checkpoint = newest_checkpoint(checkpoint_folders(config))
        self._folder, self._digest = folder, settings_digest(config.as_dict(), checkpoint)
        if self._writes_nothing(config):
            return
        check_writable(folder)
        if config.trainer.default_root_dir is None:  # else Lightning writes to wherever the command was typed
            config.trainer.default_root_dir = str(folder)
        if self.subcommand in EVALUATIONS:
            self._folder = folder_of_evaluation(folder, self.subcommand, self._digest)
            if self._folder != folder:
                redirected(config, folder, self._folder)

    def _writes_nothing(self, config: Any) -> bool:
        return bool(config.trainer.fast_dev_run)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except SettingError:
            raise
        except Exception as error:
            message = explain_instantiation(error)
            if message is None:
                raise RuntimeError("Building the run failed, and no setting is to blame: see above.") from error
            raise SettingError(message) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        callbacks = wanted(built_callbacks(self).values(), self.config_init[self.subcommand].trainer)
        for callback in callbacks:
            if type(callback) is ModelCheckpoint:
                callback.__class__ = RunCheckpoint  # whatever its settings: `last.ckpt` must never stay behind
        from cli.own_callbacks import own_callbacks  # knows the generators' libraries

        callbacks += own_callbacks(self.subcommand, self._settings)
        try:
            return super().instantiate_trainer(callbacks=[StopSignals(), *callbacks], **kwargs)
        except TypeError as error:  # Lightning's own checks raise it for a bad number of devices and the like
            raise SettingError(f"trainer: {error}") from error

    @override
    def after_instantiate_classes(self) -> None:
        # these know the generators' libraries and sharded checkpoints: a misspelt key needn't wait for them
        from cli.doctor_checks import faults
        from cli.doctor_setup import setup_of
        from cli.trainer_arguments import problem_of_strategy
        from flow_rl.planning.native import problems_of_guidance
        from lightning_modules.base import TrainedModule
        from strategies.checkpoints import AtomicCheckpointIO

        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        setup = setup_of(self, self.subcommand)
        chosen = problem_of_strategy(self.trainer.strategy) if isinstance(self.model, TrainedModule) else None
        refuse(faults(setup) or ([] if chosen is None else [chosen]))
        for problem in problems_of_guidance(setup):
            rank_zero_warn(problem)
        self._asked_for = self.config_init[self.subcommand].get("ckpt_path")
        self._choose_checkpoint()

    def before_fit(self) -> None:
        """Tidy up after a crash, now that training is about to start, and look again at what to go on from."""
        config = self.config_init[self.subcommand]
        if rank_zero_only.rank == 0 and not self._writes_nothing(config):  # one process does, before any of them saves
            folders = self._checkpoint_directories()
            if not restarted():
                check_fit(self._folder, folders, config.ckpt_path)
            claim(self._folder, "fit", self._digest)
            logs = self._claim_logs(resumes=restarted() or config.ckpt_path is not None)
            for directory in folders:
                place = Path(directory).resolve()
                if not place.is_relative_to(self._folder.resolve()) and place not in logs:
                    lock(Path(directory), "ModelCheckpoint.dirpath")
                sweep(directory)
            keep_former_config(self._folder)
            if not restarted():
                mark_start(self._folder)
        self._choose_checkpoint()
        self._compare_settings()
        self._examine_checkpoint()

    def before_validate(self) -> None:
        """Take the folder, and look at the checkpoint before a model loads."""
        config = self.config_init[self.subcommand]
        if rank_zero_only.rank == 0 and not self._writes_nothing(config):
            claim(self._folder, self.subcommand, self._digest)
            self._claim_logs(resumes=False)
        self._examine_checkpoint()

    before_test = before_predict = before_validate

    def before_curate(self) -> None:
        """Take the file of scores."""
        scores = Path(self.config_init[self.subcommand].curation.scores)
        if rank_zero_only.rank == 0:
            lock(scores.with_name(f"{scores.name}.parts"), "--curation.scores")

    def _claim_logs(self, *, resumes: bool) -> list[Path]:
        folders = [Path(place) for logger in self.trainer.loggers if (place := getattr(logger, "log_dir", None))]
        return claim_logs(folders, self._folder, self.subcommand, self._digest, resumes=resumes)

    def _examine_checkpoint(self) -> None:
        """Refuse a checkpoint that is damaged, or that belongs to another model, before one loads."""
        from lightning_modules.base import TrainedModule  # these know the generators' libraries
        from lightning_modules.checkpoint_identity import check_belongs
        from strategies.checkpoint_reading import read_description

        path = self.config_init[self.subcommand].get("ckpt_path")
        if path is not None and isinstance(self.model, TrainedModule):
            check_belongs(self.model, read_description(Path(path)), str(path), fits=self.subcommand == "fit")

    def _compare_settings(self) -> None:
        """Have checkpoints record the settings, and refuse to resume under some that would train something else."""
        from lightning_modules.base import TrainedModule

        if not isinstance(self.model, TrainedModule):
            return
        now = self._settings.record = record_of(plain(self.config[self.subcommand]), self.model)
        path = self.config_init[self.subcommand].get("ckpt_path")
        if path is not None:
            compare_with_checkpoint(Path(path), now, module=type(self.model))

    def _choose_checkpoint(self) -> None:
        config = self.config_init[self.subcommand]
        if self.subcommand == "fit" or self._asked_for == "last":
            config.ckpt_path = checkpoint_to_resume(
                self._asked_for,
                self._checkpoint_directories(),
                self._folder,
                restarted=self.subcommand == "fit" and restarted(),
            )

    def _checkpoint_directories(self) -> list[str]:
        return [c.dirpath for c in self.trainer.checkpoint_callbacks if getattr(c, "dirpath", None)]

    @override
    def _parse_ckpt_path(self) -> None:
        """Keep what the user passes: Lightning's own version lets a checkpoint's hyper-parameters win."""


def _in_a_batch(error: BaseException) -> bool:
    """Tell whether Lightning's loops were running: then no setting is to blame and the traceback matters."""
    return any(frame.f_code.co_name in BATCH_FUNCTIONS for frame, _ in traceback.walk_tb(error.__traceback__))


def _run(cli: type[FlowCLI], args: list[str] | None) -> FlowCLI:
    return cli(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=FlowTrainer,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        parser_class=StrictParser,
        parser_kwargs={"exit_on_error": False, "description": DESCRIPTION},
        auto_configure_optimizers=False,
        seed_everything_default=0,
        args=args,
    )


def main(args: list[str] | None = None) -> None:
    """Run a subcommand; a bad setting ends in one message and exit status 2.

    Args:
        args: the command line; None for the process's own.
    """
    given = sys.argv[1:] if args is None else args
    # The texts of settings are read from the sources of their classes, which takes seconds: only where they are shown.
    shown = any(argument == "-h" or "help" in argument or "print_config" in argument for argument in given)
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True, docstring_parse_attribute_docstrings=shown)
    install()
    leave_out_advice()
    end_with_launcher()
    if message := warning_of_restarts():
        print(f"warning: {message}", file=sys.stderr)
    try:
        if given[:1] == [DOCTOR]:
            from cli.doctor import examine  # only this subcommand needs it

            examine(given[1:], _run, FlowCLI)
        else:
            _run(FlowCLI, args)
    except (ValueError, OSError, MisconfigurationException, RunStopped) as error:
        stopped = isinstance(error, RunStopped) or refused_by_disk(error)  # no fault of the code, whatever was running
        if os.environ.get(TRACEBACK_VARIABLE) == "1" or (_in_a_batch(error) and not stopped):
            raise
        complain(explain_disk(error))
    finally:
        end_bars()
        release()
