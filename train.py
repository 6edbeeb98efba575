"""The entry point: a LightningCLI and nothing else.

    python train.py fit      --config configs/demo/world.yaml --config configs/demo/grpo_t2i.yaml
    python train.py validate | test | predict ...  --model.model_path=...

Several `--config` files stack, later ones win, and the command line wins over all. `${run.dir}` and the like are
resolved last, so they see every override.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentError, set_docstring_parse_options, set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

#: set to 1 to see the traceback of a bad setting
TRACEBACK_VARIABLE = "FLOW_RL_TRACEBACK"


class FlowCLI(LightningCLI):
    """LightningCLI with run-wide values for interpolation and checks that come before any model."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run.dir", type=str, default="runs", help="where everything of this run is written")
        parser.add_argument("--run.name", type=str, default="dev", help="folder of this run under run.dir")
        parser.add_argument("--run.seed", type=int, default=0, help="of data order, noise, windows and noise levels")
        parser.add_argument("--run.threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")

    @override
    def before_instantiate_classes(self) -> None:
        run = self.config[self.subcommand].run
        _check_writable(Path(run.dir) / run.name)
        if run.threads > 0:
            torch.set_num_threads(run.threads)
        # Denormals make a CPU step up to a hundred times slower, and round to nothing that matters.
        torch.set_flush_denormal(True)

    @override
    def _parse_ckpt_path(self) -> None:
        """Keep what the user passes: Lightning's own version lets a checkpoint's hyper-parameters win."""


def _check_writable(directory: Path) -> None:
    """Find out now, not after an hour, that the run has nowhere to write.

    Raises:
        ValueError: the directory can't be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"Can't write to the run directory '{directory}' ({error.strerror}). Choose another with --run.dir."
        ) from None


def main(args: list[str] | None = None) -> None:
    """Run a subcommand; a bad setting ends in one message and exit status 2.

    Args:
        args: the command line; None for the process's own.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    set_docstring_parse_options(attribute_docstrings=True)
    try:
        FlowCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=args,
        )
    except (ArgumentError, ValueError, FileNotFoundError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        print(f"error: {error}\n(set {TRACEBACK_VARIABLE}=1 to see where it came from)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
