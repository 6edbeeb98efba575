"""`python train.py doctor --config FILE ... [--device H100-80GB] [--fit 8xH100-80GB] [--utilisation 0.4]`.

`--stage test` checks a stack that is meant for another subcommand than `fit`. `--data` alone looks at the data: all
rows and pictures, and the prompts' lengths, with every fault in one list.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cli.doctor_checks import problems, problems_of_copies, problems_of_disk, problems_of_files
from cli.doctor_data import examine_data, stand_in_for_data
from cli.doctor_setup import setup_of
from flow_rl.errors import SettingError, refuse
from flow_rl.planning import report
from flow_rl.planning.devices import Device, find_device, parse_fleet
from flow_rl.planning.native import describe, problems_of_guidance
from flow_rl.planning.plan import Plan, fit, make_plan
from flow_rl.planning.setup import Setup
from flow_rl.planning.weights import Components, build

#: share of the peak assumed where nothing is measured: what large transformers reach with sharding and checkpointing
UTILISATION = 0.4


def examine(args: list[str], make_cli: Callable[[type, list[str]], Any], base: type) -> None:
    """Check a run and print its plan.

    Args:
        args: the command line behind `doctor`: configs and overrides as for `fit`, and the doctor's own options.
        make_cli: builds a CLI of a class for a command line.
        base: the class of the CLI.

    Raises:
        SettingError: with everything that is wrong.
    """
    args, data_alone = _without_data(args)
    options, rest = _parser().parse_known_args(args)
    if data_alone:
        with _nothing_compiled():
            examine_data(make_cli, _examination(base, options.stage, None), [options.stage, *rest])
        return
    device = None if options.device is None else find_device(options.device)
    fleet = None if options.fit is None else parse_fleet(options.fit)
    if not 0 < options.utilisation <= 1:
        raise SettingError(f"--utilisation is {options.utilisation}; it is a share of the peak, in (0, 1].")
    with _nothing_compiled():
        setup, missing = examined(options.stage, rest, make_cli, base)
        _answer(setup, missing, options, device, fleet)


def examined(
    stage: str, args: list[str], make_cli: Callable[[type, list[str]], Any], base: type
) -> tuple[Setup, list[str]]:
    """What a run needs to be planned, with stand-ins for its rewards and for data files that are not there.

    Args:
        stage: subcommand that the configs are meant for.
        args: configs and overrides.
        make_cli: see `examine`.
        base: see `examine`.

    Returns:
        The run, and a sentence on each file that is missing.
    """
    with TemporaryDirectory() as directory:
        cli = make_cli(_examination(base, stage, Path(directory)), [stage, *args])
        return setup_of(cli, stage), cli.missing


def _answer(
    setup: Setup,
    missing: list[str],
    options: argparse.Namespace,
    device: Device | None,
    fleet: tuple[int, Device] | None,
) -> None:
    generator = setup.profile.generator
    refuse(problems(setup))
    absent = [*missing, *problems_of_files(setup)]
    if generator is None:
        refuse(absent)
        print("The configuration is sound. Memory and speed are planned for stages that make images only.")
        return
    path, parts = generator.model_path, _parts(generator.model_path, generator.lora)
    if options.stage != "fit":
        print("\n".join([*report.sources(path), *describe(setup), *report.parameters(parts)]))
        refuse([*absent, *problems_of_guidance(setup)])
        print("The configuration is sound.")
        return
    plan = make_plan(setup, parts)
    _show(plan, parts, path)
    print("\n".join(describe(setup)))
    if plan is not None and device is not None:
        print("\n".join(report.speed(plan, device, options.utilisation)))
    if plan is not None and fleet is not None:
        proposed = fit(plan, *fleet)
        print("\n".join([*report.overrides(proposed), *report.memory(proposed)]))
        print("\n".join(report.speed(proposed, fleet[1], options.utilisation)))
    # The plan is worth seeing before the data are there, and on a machine that the run is not meant for.
    late = (problems_of_guidance(setup), problems_of_copies(setup, parts), problems_of_disk(setup, parts))
    refuse([*absent, *chain(*late)])
    if plan is not None and fleet is None and device is not None and plan.peak > device.memory:
        raise SettingError(
            f"A rank needs {plan.peak / 1e9:.0f} GB and a {device.name} has {device.memory / 1e9:.0f}: --fit "
            f"{plan.work.ranks}x{device.name} proposes micro-batch, checkpointing and offload that fit."
        )


@lru_cache(maxsize=2)
def _parts(path: str, lora: Any) -> Components:
    """The parts of a model, kept for whoever examines several runs of it in one process: so are the readings."""
    return build(path, lora)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Make `torch.compile` do nothing.

    diffusers imports peft and that one bitsandbytes, whose functions are decorated with it: decorating alone imports
    the compiler, which takes seconds.
    """
    variable = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _without_data(args: list[str]) -> tuple[list[str], bool]:
    """The command line without the doctor's `--data`, and whether it was there; `--data CLASS` is a setting."""
    following = [*args[1:], "-"]
    flags = {at for at, argument in enumerate(args) if argument == "--data" and following[at].startswith("-")}
    return [argument for at, argument in enumerate(args) if at not in flags], bool(flags)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--stage", default="fit", choices=("fit", "validate", "test", "predict"), help="what will be run"
    )
    parser.add_argument("--data", action="store_true", help="look at the data alone, and list all their faults")
    parser.add_argument("--device", help="also estimate seconds an iteration on this device, and whether it fits")
    parser.add_argument("--fit", help="propose how to run the same work on so many of a device: 8xH100-80GB")
    parser.add_argument(
        "--utilisation", type=float, default=UTILISATION, help="share of the device's peak that is reached"
    )
    return parser


def _examination(base: type, stage: str, directory: Path | None) -> type:
    """A CLI that builds module and data and stops there: no trainer, no weights.

    It writes files that stand in for missing data into `directory` and lists what is missing in `missing`; without a
    directory, a missing file is a fault.
    """

    class Examination(base):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {stage: base.subcommands()[stage]}  # the other parsers take time to make

        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            _plan_rewards(self.config[self.subcommand])
            data = self.config[self.subcommand].get("data")
            self.missing = [] if directory is None else stand_in_for_data(data, directory)

        def instantiate_trainer(self, **kwargs: Any) -> None:
            return None

        def after_instantiate_classes(self) -> None:
            return None

        def _run_subcommand(self, subcommand: str) -> None:
            return None

    return Examination


def _plan_rewards(config: Any) -> None:
    """Vision-language rewards load their weights as they are built: a stub takes their place."""
    arguments = (config.get("model") or {}).get("init_args") or {}
    for group in ("rewards", "judges", "monitors"):
        for spec in (arguments.get(group) or {}).values():
            _plan_reward(spec)


def _plan_reward(spec: Any) -> None:
    """As `_plan_rewards`, for one reward and for what it wraps."""
    if spec.get("class_path") == "flow_rl.rewards.vlm.VLMReward":
        spec["class_path"] = "flow_rl.planning.stubs.PlannedVLMReward"
    wrapped = (spec.get("init_args") or {}).get("reward")
    if hasattr(wrapped, "get"):
        _plan_reward(wrapped)


def _show(plan: Plan | None, parts: Components, path: str) -> None:
    lines = [*report.sources(path), *report.parameters(parts)]
    if plan is not None:
        lines += [*report.workload(plan), *report.memory(plan)]
    print("\n".join(lines))
