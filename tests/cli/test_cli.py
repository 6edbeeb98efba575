"""The command line: good input reaches the trainer, and an error is a message or a traceback as it should be."""

from __future__ import annotations

from functools import wraps
from pathlib import Path

import pytest
import torch
import yaml
from lightning import LightningModule, Trainer

from cli import app
from cli.errors import explain_instantiation, explain_parsing, settings_of
from demo.scorers import sets
from flow_rl.rl.objectives import Guarded
from flow_rl.suggestions import nearest
from tests.cli.command_lines import TEACHER, complaint, good

pytestmark = pytest.mark.usefixtures("nothing_loads")


@pytest.mark.usefixtures("only_fit")
def test_reward_file_that_is_missing_is_named(monkeypatch, capsys, tiny_path, tmp_path):
    def load(network, file):
        raise FileNotFoundError(f"{file} is missing: train it.")

    monkeypatch.setattr(sets, "load_weights", load)
    assert "annotator.safetensors is missing" in complaint(capsys, good(tiny_path, tmp_path))


@pytest.mark.usefixtures("only_fit")
def test_fault_in_the_code_keeps_its_traceback(monkeypatch, tiny_path, tmp_path):
    def load(network, file):
        raise AttributeError("a bug")

    monkeypatch.setattr(sets, "load_weights", load)
    with pytest.raises(RuntimeError, match="no setting is to blame"):
        app.main(good(tiny_path, tmp_path))


@pytest.mark.usefixtures("only_fit")
def test_error_at_the_start_of_a_run_is_a_message(monkeypatch, capsys, tiny_path, tmp_path):
    def start(*_args):
        raise ValueError("at the start")

    monkeypatch.setattr(app.FlowCLI, "_run_subcommand", start)
    assert "error: at the start" in complaint(capsys, good(tiny_path, tmp_path))


@pytest.mark.usefixtures("only_fit")
def test_traceback_on_request(monkeypatch, tiny_path, tmp_path):
    monkeypatch.setenv(app.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="33 x 33"):
        app.main(good(tiny_path, tmp_path, "--model.image_size=33"))


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_good_input_arrives_quietly(subcommand, arrived, recwarn, capsys, tiny_path, tmp_path):
    app.main(good(tiny_path, tmp_path, subcommand=subcommand))
    assert arrived[0].subcommand == subcommand
    assert "Tip" not in capsys.readouterr().err
    # Deprecations inside libraries are not shown to users.
    assert [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)] == []


def test_predictions_are_not_kept_in_memory(monkeypatch, tiny_path, tmp_path):
    given = {}
    monkeypatch.setattr(Trainer, "predict", wraps(Trainer.predict)(lambda _self, **kwargs: given.update(kwargs)))
    app.main(good(tiny_path, tmp_path, subcommand="predict"))
    assert given["return_predictions"] is False
    assert {"model", "datamodule", "ckpt_path"} <= given.keys()


@pytest.mark.usefixtures("only_fit")
def test_interpolation_sees_overrides(arrived, tiny_path, tmp_path):
    app.main(good(tiny_path, tmp_path, "--run.name=other", "--run.seed=7"))
    trainer, place = arrived[0].trainer, tmp_path / "runs" / "other"
    assert Path(trainer.logger.log_dir) == place
    assert Path(trainer.checkpoint_callback.dirpath) == place / "checkpoints"
    assert next(c for c in trainer.callbacks if type(c).__name__ == "ExportModel").directory == place / "export"
    assert arrived[0].model.seed == arrived[0].datamodule.seed == 7


@pytest.mark.usefixtures("only_fit")
def test_configs_stack_and_the_command_line_wins(arrived, tiny_path, tmp_path):
    stack = [
        "--config",
        "configs/guidance/rollout_only.yaml",
        "--config",
        "configs/objective/clipped.yaml",
        "--config",
        "configs/adapter/lora.yaml",
    ]
    app.main(good(tiny_path, tmp_path, *stack, "--model.objective=Guarded"))
    model = arrived[0].model
    assert isinstance(model.objective, Guarded)  # the command line
    assert model.rollout_settings.transition == "flow_sde"  # the second file
    assert model.lora.rank == 16  # the third
    assert model.image_size == 32  # the first


@pytest.mark.usefixtures("only_fit")
def test_print_config_shows_the_overrides(capsys, tiny_path, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        app.main(good(tiny_path, tmp_path, "--model.rollout.group_size=5", "--print_config=skip_null"))
    assert exit_info.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["rollout"]["group_size"] == 5
    assert shown["run"]["dir"] == f"{tmp_path}/runs"


@pytest.mark.usefixtures("only_fit")
def test_last_checkpoint_of_the_run_is_accepted(arrived, tiny_path, tmp_path):
    checkpoints = tmp_path / "runs" / "t2i_teacher" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").write_bytes(b"")
    app.main(good(tiny_path, tmp_path, "--ckpt_path=last"))
    assert arrived[0].config_init.fit.ckpt_path == str(checkpoints / "last.ckpt")


def test_text_that_is_not_understood_is_shortened():
    text = "Does not validate against any\nSubtypes: [x]\n  - something odd\n" + "y" * 5000
    assert explain_parsing(ValueError(text), []).splitlines()[0] == "something odd"
    assert len(explain_parsing(ValueError(text), [])) < 1000
    assert explain_parsing(ValueError(""), []) == "unknown error"
    assert explain_parsing(ValueError("module 'no.such' has no attribute 'x'"), []) != ""


def test_deepest_cause_of_a_refusal_is_shown():
    error = ValueError("Does not validate")
    error.__cause__ = ValueError("decay is 3")
    assert explain_instantiation(error) == "decay is 3"
    error.__cause__ = AttributeError("a bug")
    assert explain_instantiation(error) is None


def test_settings_and_nearest_names():
    names = settings_of("lightning_modules.GRPOPolicy")
    assert {"model_path", "rollout.guidance.scale", "rollout.window.kind"} <= set(names)
    assert nearest("WEIGHTEMA", ["WeightEMA", "Other"]) == " Did you mean 'WeightEMA'?"
    assert nearest("zzz", ["WeightEMA"]) == ""


class OneBatch(LightningModule):
    """Fails in the first batch, whatever the stage."""

    def training_step(self, *_args):
        raise ValueError("in the middle")

    validation_step = test_step = predict_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_error_inside_a_batch_is_told_from_one_before(stage, tmp_path):
    trainer = Trainer(
        accelerator="cpu", logger=False, max_steps=1, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match="in the middle") as error_info:
        getattr(trainer, stage)(OneBatch(), torch.utils.data.DataLoader([torch.zeros(1)]))
    assert app._in_a_batch(error_info.value)
    with pytest.raises(ValueError, match="before") as error_info:
        raise ValueError("before")
    assert not app._in_a_batch(error_info.value)


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["fit", "--help"], True),
        (["fit", "-h"], True),
        (["fit", "--model.help=lightning_modules.GRPOPolicy"], True),
        (["fit", "--print_config=comments"], True),
        (["fit", "--config", TEACHER], False),
    ],
)
def test_texts_of_settings_are_read_where_they_are_shown(words, read, monkeypatch) -> None:
    given = {}
    monkeypatch.setattr("cli.app.set_parsing_settings", lambda **settings: given.update(settings))
    monkeypatch.setattr("cli.app._run", lambda _cli, _args: None)
    app.main(words)
    assert given["docstring_parse_attribute_docstrings"] is read
