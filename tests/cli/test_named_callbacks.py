"""Callbacks by name: a later file or the command line changes, removes or adds one, and the others stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from lightning import Callback

from callbacks import Preemption, UpdateProbe, WeightEMA
from cli import app
from cli.named_callbacks import built_callbacks, callback_names
from flow_rl.errors import SettingError
from tests.cli.command_lines import TEACHER, VERIFIERS, complaint, good

pytestmark = pytest.mark.usefixtures("nothing_loads", "only_fit")

SHIPPED = ["progress", "timer", "probe", "ema", "monitor", "grids", "layout", "checkpoint", "export"]


class Mine(Callback):
    """One of a user's own."""

    def __init__(self, every: int = 1) -> None:
        self.every = every


MINE = f"{__name__}.Mine"


@pytest.fixture
def run(arrived, tiny_path, tmp_path):
    """What arrives at the trainer of the teacher with options or the content of a file added."""

    def run(*options: str, file: str | None = None) -> app.FlowCLI:
        if file is not None:
            (tmp_path / "mine.yaml").write_text(file)
            options = (f"--config={tmp_path}/mine.yaml", *options)
        app.main(good(tiny_path, tmp_path, *options))
        return arrived.pop()

    return run


def test_a_stage_has_its_callbacks_in_order(run) -> None:
    cli = run()
    named = built_callbacks(cli)
    assert list(named) == SHIPPED
    assert [c for c in cli.trainer.callbacks if c in named.values()] == [
        *(named[name] for name in SHIPPED if name != "checkpoint"),
        named["checkpoint"],  # Lightning itself moves what writes checkpoints to the end
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"file": "callbacks: {ema: {init_args: {decay: 0.9}}}"},
        {"options": ["--callbacks.ema.init_args.decay=0.9"]},
        {"options": ["--callbacks.ema.decay", "0.9"]},
    ],
)
def test_one_setting_changes_and_nothing_else(change, run) -> None:
    named = built_callbacks(run(*change.get("options", ()), file=change.get("file")))
    assert (named["ema"].decay, named["ema"].warmup) == (0.9, 4)
    assert list(named) == SHIPPED


@pytest.mark.parametrize("change", [{"file": "callbacks: {probe: null}"}, {"options": ["--callbacks.probe=null"]}])
def test_one_is_taken_out(change, run) -> None:
    cli = run(*change.get("options", ()), file=change.get("file"))
    assert list(built_callbacks(cli)) == [name for name in SHIPPED if name != "probe"]
    assert not any(isinstance(callback, UpdateProbe) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize(
    "change",
    [
        {"file": f"callbacks: {{mine: {{class_path: {MINE}, init_args: {{every: 3}}}}}}"},
        {"file": f"callbacks: {{mine: {MINE}}}", "options": ["--callbacks.mine.every=3"]},
        {"options": [f"--callbacks.mine={MINE}", "--callbacks.mine.every=3"]},
    ],
)
def test_a_users_own_is_added_behind_the_others(change, run) -> None:
    named = built_callbacks(run(*change.get("options", ()), file=change.get("file")))
    assert list(named) == [*SHIPPED, "mine"]
    assert (type(named["mine"]), named["mine"].every) == (Mine, 3)


def test_another_class_takes_a_name_and_its_place(run) -> None:
    named = built_callbacks(run(f"--callbacks.probe={MINE}"))
    assert list(named) == SHIPPED
    assert type(named["probe"]) is Mine


def test_null_takes_out_all_that_came_before(run) -> None:
    assert list(built_callbacks(run(file="callbacks: null"))) == []
    assert list(built_callbacks(run("--config=configs/callbacks/none.yaml", f"--callbacks.mine={MINE}"))) == ["mine"]


def test_a_name_of_two_files_is_one_callback(run) -> None:
    """A stage for several GPUs and a strategy both have a Preemption."""
    again = "callbacks: {preemption: {init_args: {every: 2}}}"
    named = built_callbacks(run("--config=configs/strategy/single.yaml", "--config", "configs/debug/two_steps.yaml"))
    assert [type(c) for c in named.values()].count(Preemption) == 1
    with pytest.raises(SystemExit):
        run(file=again)  # without the strategy nothing says what it is


def test_a_list_of_a_users_own_alone_is_lightnings(run, tmp_path) -> None:
    callbacks = f"trainer: {{callbacks: [{{class_path: {MINE}, init_args: {{every: 5}}}}]}}"
    cli = run("--config=configs/callbacks/none.yaml", file=callbacks)
    assert list(built_callbacks(cli)) == ["trainer.callbacks[0]"]
    assert [c.every for c in cli.trainer.callbacks if isinstance(c, Mine)] == [5]


def test_a_saved_run_is_repeated_as_it_was(run, arrived, tmp_path) -> None:
    """What is saved is whole: no stage, include or default changes it when it is read again."""
    first = run("--callbacks.probe=null", "--callbacks.ema.decay=0.9", f"--callbacks.mine={MINE}", "--run.seed=3")
    saved = tmp_path / "saved" / "config.yaml"
    saved.parent.mkdir()
    app_parser, config = first._parser("fit"), first.config["fit"]
    app_parser.save(config, str(saved), skip_unset=False)
    assert "include" not in yaml.safe_load(saved.read_text())
    app.main(["fit", f"--config={saved}"])
    again = arrived.pop()
    assert again.config["fit"].as_dict() | {"config": None} == config.as_dict() | {"config": None}
    assert list(built_callbacks(again)) == list(built_callbacks(first))


def test_printed_config_is_whole_and_runs_again(run, arrived, capsys, tiny_path, tmp_path) -> None:
    with pytest.raises(SystemExit):
        app.main(good(tiny_path, tmp_path, "--callbacks.probe=null", "--print_config"))
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    shown = yaml.safe_load(printed.read_text())
    assert shown["callbacks"]["ema"]["init_args"]["decay"] == 0.98
    assert shown["trainer"]["logger"]["class_path"].endswith("TensorBoardLogger")
    app.main(["fit", f"--config={printed}"])
    assert list(built_callbacks(arrived.pop())) == [name for name in SHIPPED if name != "probe"]


def test_a_users_file_elsewhere_includes_a_stage(arrived, tiny_path, tmp_path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"include: {Path(TEACHER).resolve()}\ncallbacks: {{ema: {{init_args: {{decay: 0.5}}}}}}\n")
    app.main(
        [
            "fit",
            f"--config={mine}",
            f"--config={VERIFIERS}",
            f"--model.model_path={tiny_path}",
            f"--run.dir={tmp_path}/runs",
        ]
    )
    cli = arrived.pop()
    assert built_callbacks(cli)["ema"].decay == 0.5
    assert cli.model.rollout_settings.group_size == 4  # of a file that the stage includes
    assert sum(isinstance(c, WeightEMA) for c in cli.trainer.callbacks) == 1


def test_a_mistake_in_an_included_file_names_that_file(capsys, tiny_path, tmp_path) -> None:
    model = "{class_path: lightning_modules.GRPOPolicy, init_args: {image_siz: 3}}"
    (tmp_path / "base.yaml").write_text(f"model: {model}\n")
    (tmp_path / "mine.yaml").write_text("include: base.yaml\n")
    text = complaint(capsys, good(tiny_path, tmp_path, f"--config={tmp_path}/mine.yaml"))
    assert "base.yaml:1: model (lightning_modules.GRPOPolicy) has no setting 'image_siz'" in text
    (tmp_path / "base.yaml").write_text("run: {}\na: [1, 2\nb: 3\n")
    text = complaint(capsys, good(tiny_path, tmp_path, f"--config={tmp_path}/mine.yaml"))
    assert "base.yaml:3: not valid YAML (column 2)" in text


def test_a_stage_behind_what_changes_it_is_refused() -> None:
    with pytest.raises(SettingError, match=r"stage.yaml: there is no callback .* A stage comes before what changes it"):
        callback_names(["--config=configs/filter/offline.yaml", "--config=configs/shared/stage.yaml"])
