"""What a start imports and says: help without torch, nothing heavy for `fit --help`, errors on lines of their own."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from lightning import Callback
from tqdm import tqdm

from cli import app, entry
from cli.complaints import complain
from cli.deferred_modules import _Finder
from cli.quiet import leave_out_advice
from cli.subcommands import DOCTOR, SUBCOMMANDS, light_parser
from flow_rl.errors import RunStopped
from tests.cli.command_lines import complaint, good

ROOT = Path(__file__).parents[2]
#: what no help may import, each a second or more of a processor
HEAVY = {
    "bitsandbytes.functional", "datasets", "diffusers", "matplotlib", "peft", "scipy", "sympy", "tensorboard",
    "torch._dynamo.convert_frame", "torch.distributed.checkpoint", "torch.distributed.tensor",
    "torchmetrics.functional", "torchvision", "transformers",
}  # fmt: skip


def python(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def imported_by(*words: str) -> tuple[set[str], str]:
    """Modules of a process that ran a command line, and what it printed."""
    code = f"""
import runpy, sys
sys.argv = ["train.py", *{words!r}]
sys.path.insert(0, ".")
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("MODULES", *sys.modules)
"""
    text, _, modules = python(code).stdout.rpartition("MODULES")
    return set(modules.split()), text


def test_help_needs_neither_torch_nor_lightning() -> None:
    modules, text = imported_by("--help")
    assert {"torch", "lightning", "omegaconf", *HEAVY}.isdisjoint(modules)
    for name in SUBCOMMANDS:
        assert f"\n    {name} " in text


def test_help_of_fit_imports_nothing_heavy() -> None:
    modules, text = imported_by("fit", "--help")
    assert not HEAVY & modules
    assert "--trainer.max_steps" in text
    told = " ".join(text.split())
    for named in ("lightning_modules.GRPOPolicy", "datamodules.PromptDataModule", "callbacks.WeightEMA"):
        assert named in told


@pytest.mark.parametrize("width", ["80", "132"])
def test_the_light_help_is_that_of_the_whole_parser(width: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit):
        app.main(["--help"])
    whole = capsys.readouterr().out
    entry.main(["--help"])
    assert capsys.readouterr().out == whole == light_parser().format_help()


def test_every_subcommand_is_listed() -> None:
    assert list(SUBCOMMANDS) == [*app.FlowCLI.subcommands(), DOCTOR]


@pytest.mark.parametrize(("typed", "meant"), [("fti", "fit"), ("docter", "doctor"), ("curat", "curate")])
@pytest.mark.parametrize("main", [entry.main, app.main])
def test_a_misspelt_subcommand_names_the_nearest(main, typed: str, meant: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([typed])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: Unknown subcommand '{typed}'")
    assert f"Did you mean '{meant}'?" in told


def test_doctor_comes_first(tmp_path, capsys) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("{}")
    assert "doctor comes first" in complaint(capsys, [f"--config={empty}", "doctor"])


@pytest.mark.parametrize("leave", [True, False])
def test_an_error_begins_on_a_line_of_its_own(leave: bool, capsys) -> None:
    bar = tqdm(total=3, leave=leave, file=sys.stderr)
    bar.update()
    with pytest.raises(SystemExit):
        complain("the disk is full")
    assert "error: the disk is full" in capsys.readouterr().err.split("\n")


class Stops(Callback):
    """Ends training in its first batch."""

    def on_train_batch_start(self, *args, **kwargs) -> None:
        raise RunStopped("enough")


def test_an_error_of_a_run_begins_on_a_line_of_its_own(tiny_path, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        app.main(good(tiny_path, tmp_path, f"--callbacks.stops={__name__}.Stops"))
    told = capsys.readouterr().err
    assert "/s]" in told or "it/s" in told  # a bar was open
    assert "error: enough" in told.split("\n")


def test_a_class_may_be_named_without_its_package(tiny_path, tmp_path, capsys) -> None:
    python(
        "import os, sys; sys.path.insert(0, os.getcwd()); sys.argv[0] = 'train.py'\n"
        "from cli import entry\n"
        f"try: entry.main({good(tiny_path, tmp_path, '--callbacks.more=Preemption', '--print_config')!r})\n"
        "except SystemExit as end: assert not end.code"
    )


@pytest.mark.slow
def test_bitsandbytes_waits_until_something_is_quantised() -> None:
    done = python(
        "import sys\n"
        "from cli import deferred_modules; deferred_modules.install()\n"
        "import peft\n"
        "assert 'bitsandbytes.functional' not in sys.modules\n"
        "print('so far', file=sys.stderr)\n"
        "from bitsandbytes.optim import AdamW8bit\n"
        "import bitsandbytes\n"
        "assert type(bitsandbytes).__name__ == 'module'\n"
        "assert bitsandbytes.optim.AdamW8bit is AdamW8bit is sys.modules['bitsandbytes.optim'].AdamW8bit\n"
        "assert bitsandbytes.nn.Linear4bit is peft.helpers.bnb.nn.Linear4bit\n"
    )
    assert "gemm_4bit" not in done.stderr.partition("so far")[0]


def test_a_kernel_that_is_not_needed_is_not_reported() -> None:
    leave_out_advice()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")  # says this where the processor has bfloat16
    text = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    assert not logger.filter(logger.makeRecord(logger.name, logging.WARNING, "", 0, text, ("no kernels",), None))
    assert logger.filter(logger.makeRecord(logger.name, logging.WARNING, "", 0, "Something else.", (), None))


def test_only_help_defers_modules(monkeypatch) -> None:
    installed = []
    monkeypatch.setattr(entry.deferred_modules, "install", lambda: installed.append(1))
    monkeypatch.setattr(app, "main", lambda _args: None)
    entry.main(["fit", "--config=a.yaml"])
    assert not installed
    entry.main(["fit", "--help"])
    assert installed


@pytest.mark.slow
def test_what_is_deferred_is_whole_once_it_is_used() -> None:
    python(
        "import sys\n"
        "from cli import deferred_modules; deferred_modules.install()\n"
        "import torch, lightning\n"
        "from lightning.pytorch.utilities.compile import OptimizedModule\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "assert not isinstance(layer, OptimizedModule)\n"
        "assert 'torch._dynamo.convert_frame' not in sys.modules\n"
        "assert isinstance(torch.compile(layer, backend='eager'), OptimizedModule)\n"
        "from torchmetrics import Metric, MeanMetric\n"
        "from torchmetrics.image import PeakSignalNoiseRatio\n"
        "import torchmetrics\n"
        "assert issubclass(PeakSignalNoiseRatio, Metric) and issubclass(torchmetrics.Accuracy, object)\n"
        "assert torchmetrics.MeanMetric is MeanMetric and torchmetrics.Metric is Metric is torchmetrics.metric.Metric\n"
        "assert float(torchmetrics.functional.spearman_corrcoef(torch.arange(4.), torch.arange(4.))) > 0.99\n"
        "assert MeanMetric().plot and torchmetrics.utilities.plot.plot_curve\n"
    )


def test_what_is_missing_is_missing_at_its_import(monkeypatch) -> None:
    from cli import deferred_modules

    monkeypatch.setitem(deferred_modules.DEFERRALS, "no_such_package", deferred_modules.Deferral())
    assert _Finder().find_spec("no_such_package", None) is None
