"""The command line: bad input ends in one message before a model loads; good input reaches the trainer."""

from __future__ import annotations

from functools import wraps
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import QwenImage21Pipeline
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from cli import app
from cli.errors import explain_instantiation, explain_parsing, settings_of
from demo.scorers.quality import QualityScore
from demo.scorers.verifiers import Verifier
from flow_rl.rl.objectives import Guarded
from flow_rl.suggestions import nearest

ROOT = Path(__file__).parents[2]
TEACHER = "configs/demo/t2i_teacher.yaml"


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch) -> None:
    """From the project's root, with scorers that need no weights; a generator that loads fails the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(Verifier, "load", classmethod(lambda cls, _name: cls(width=8)))
    monkeypatch.setattr(QualityScore, "load", classmethod(lambda cls, _name: cls(width=8)))
    monkeypatch.setattr(QwenImage21Pipeline, "from_pretrained", lambda *_a, **_k: pytest.fail("a model loaded"))


@pytest.fixture
def arrived(monkeypatch) -> list[app.FlowCLI]:
    """Stops every subcommand once all is instantiated, and keeps what got there."""
    seen: list[app.FlowCLI] = []
    monkeypatch.setattr(app.FlowCLI, "_run_subcommand", lambda cli, _subcommand: seen.append(cli))
    return seen


@pytest.fixture
def only_fit(monkeypatch) -> None:
    """The parser of one subcommand is made in a quarter of the time of all four."""
    fit = {"fit": LightningCLI.subcommands()["fit"]}
    monkeypatch.setattr(app.FlowCLI, "subcommands", staticmethod(lambda: fit))


def good(model_path: str, tmp_path: Path, *more: str, subcommand: str = "fit") -> list[str]:
    """A command line without mistakes, and what is added to it."""
    place = [f"--model.model_path={model_path}", f"--run.dir={tmp_path}/runs"]
    return [subcommand, "--config", TEACHER, *place, *more]


def complaint(capsys, args: list[str]) -> str:
    """What main says of bad input, having checked the form: one message, exit status 2."""
    with pytest.raises(SystemExit) as exit_info:
        app.main(args)
    text = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "Traceback" not in text
    assert "subtypes" not in text.lower()
    assert "usage:" not in text
    lines = text.strip().splitlines()
    assert len(lines) <= 6, text
    assert sum(line.startswith("error: ") for line in lines) == 1, text
    return text


OPTIONS = {
    "top level": (["--modle.image_size=3"], "no setting 'modle'", "'model'"),
    "run": (["--run.nmae=x"], "run has no setting 'nmae'", "'name'"),
    "abbreviated": (["--trainer.max_step=3"], "trainer has no setting 'max_step'", "'max_steps'"),
    "model": (
        ["--model.image_siz=3"],
        "model (lightning_modules.GRPOPolicy) has no setting 'image_siz'",
        "'image_size'",
    ),
    "record in the model": (
        ["--model.objective.kindd=nft"],
        "model.objective has no setting 'kindd'",
        "'kind'",
    ),
    "record in a record": (
        ["--model.rollout.guidence.scale=3"],
        "model.rollout has no setting 'guidence'",
        "'guidance'",
    ),
    "abbreviated deep down": (
        ["--model.rollout.guidance.scal=3"],
        "model.rollout.guidance has no setting 'scal'",
        "'scale'",
    ),
    "data": (["--data.prompts_per_stp=3"], "has no setting 'prompts_per_stp'", "'prompts_per_step'"),
    "callback": (
        ["--trainer.callbacks+=callbacks.WeightEMA", "--trainer.callbacks.deca=0.3"],
        "trainer.callbacks (callbacks.WeightEMA) has no setting 'deca'",
        "'decay'",
    ),
    "optimizer": (
        ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lrr=1"],
        "model.optimizer (torch.optim.SGD)",
        "'lr'",
    ),
    "class without its method": (
        ["--model.rewards.mine=flow_rl.rewards.Reward"],
        "model.rewards: flow_rl.rewards.Reward can't be used as it is",
        "does not implement score",
    ),
    "optional record": (["--model.lora={ranc: 3}"], "has no setting 'ranc'", "'rank'"),
    "class of the model": (
        ["--model=lightning_modules.GRPOPolcy"],
        "has no class 'GRPOPolcy'",
        "GRPOPolicy'",
    ),
    "class of a callback": (
        ["--trainer.callbacks+=callbacks.WeightEma"],
        "has no class 'WeightEma'",
        "WeightEMA'",
    ),
    "class of the optimizer": (
        ["--model.optimizer=torch.optim.Adm"],
        "'torch.optim' has no class 'Adm'",
        "Adam'",
    ),
    "module": (
        ["--model=lightning_module.GRPOPolicy"],
        "no module 'lightning_module'",
        "'lightning_modules'",
    ),
    "no model": (["--model=datamodules.PromptDataModule"], "model must be a class path of a LightningModule"),
    "stray word": (["extra"], "Unexpected argument 'extra'"),
    "integer": (
        ["--model.rollout.num_steps=ten"],
        "model.rollout.num_steps must be an integer, received 'ten'",
    ),
    "number of an optimizer": (["--model.optimizer.lr=2e-4x"], "model.optimizer.lr must be a number, received '2e-4x'"),
    "number": (
        ["--model.reward_weights.alignment=much"],
        "model.reward_weights.alignment must be a number",
        "'much'",
    ),
    "truth value": (
        ["--model.rollout.shared_noise=maybe"],
        "shared_noise must be true or false, received 'maybe'",
    ),
    "choice": (
        ["--model.rollout.transition=flow_sd"],
        "must be one of ode, flow_sde, cps, dance, received",
        "'flow_sde'",
    ),
    "several choices": (
        ["--trainer.precision=bf16-mixt"],
        "trainer.precision must be one of",
        "'bf16-mixed'",
    ),
    "several types": (["--seed_everything=abc"], "seed_everything must be true or false or an integer"),
    "config file": (
        ["--config=configs/demo/t2i_techer.yaml"],
        "No file 'configs/demo/t2i_techer.yaml'",
        TEACHER,
    ),
    "config directory": (["--config=configs/demo"], "No file 'configs/demo' (it is a directory)"),
    "prompt file": (
        ["--data.train_file=demo/prompts/trian.jsonl"],
        "No file 'demo/prompts/trian.jsonl'",
        "train.jsonl'",
    ),
    "too few prompts": (
        ["--data.prompts_per_step=5000"],
        "data.prompts_per_step is 5000",
        "has 4000 prompts",
    ),
    "model directory": (["--model.model_path=demo/no-such"], "No model directory at 'demo/no-such'"),
    "checkpoint": (["--ckpt_path=some/missing.ckpt"], "No checkpoint 'some/missing.ckpt'"),
    "seed": (["--run.seed=-1"], "run.seed is -1; it must lie between 0 and"),
    "no steps": (["--trainer.max_steps=0"], "trainer.max_steps is 0: nothing would be trained"),
    "bfloat16 weights": (["--trainer.precision=bf16-true"], "round away the small updates"),
    "last checkpoint": (["--ckpt_path=last"], "there is no complete checkpoint (*.ckpt) in"),
    "run directory": (["--run.dir=/proc/nowhere"], "Can't write to the run directory", "--run.dir"),
    "reward": (["--model.reward_weights.aligment=0.5"], "names 'aligment'", "'alignment'"),
    "sum of weights": (["--model.reward_weights.alignment=0.5"], "sum to 1"),
    "image size": (["--model.image_size=33"], "33 x 33 must be multiples of 16"),
    "learning rate": (["--model.optimizer.lr=-1"], "model.optimizer", "-1"),
    "gradient clipping": (["--model.gradient_clip=0"], "model.gradient_clip is 0"),
    "adapter": (["--model.lora={rank: 0}"], "model.lora.rank is 0"),
    "ignored guidance": (["--model.rollout.guidance.scale=2"], "the scale would be ignored"),
    "guidance": (["--model.rollout.guidance.scale=-1"], "guidance scale must be a number from 0 up"),
    "nft with noise": (["--model.rollout.transition=cps"], "nft objective trains on ODE rollouts"),
    "coarse last step": (
        [
            "--config=configs/objective/clipped.yaml",
            "--config=configs/guidance/rollout_only.yaml",
            "--model.rollout.guidance.low=0",
            "--model.rollout.num_steps=10",
        ],
        "coarse (sigma 0.25 -> 0)",
    ),
    "window": (
        ["--config=configs/objective/clipped.yaml", "--model.rollout.window.count=9"],
        "model.rollout.window: Cannot",
    ),
    "callback's value": (
        ["--trainer.callbacks+=callbacks.WeightEMA", "--trainer.callbacks.decay=3"],
        "WeightEMA decay is 3.0",
    ),
    "devices": (["--trainer.devices=x"], "trainer: `devices`"),
    "accelerator": (["--trainer.accelerator=cpuu"], "accelerator='cpuu'"),
    "clash with the module": (["--trainer.gradient_clip_val=1"], "set model.gradient_clip"),
}


@pytest.mark.usefixtures("only_fit")
@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option_is_one_message_before_any_model(case, capsys, tiny_path, tmp_path):
    added, *expected = OPTIONS[case]
    text = complaint(capsys, good(tiny_path, tmp_path, *added))
    for words in expected:
        assert words in text


GRPO = "model:\n  class_path: lightning_modules.GRPOPolicy\n  init_args:\n    "
FILES = {
    "syntax": ("run: {}\na: [1, 2\nb: 3\n", "bad.yaml: line 3, column 2 is not valid YAML"),
    "empty": ("", "bad.yaml: expected lines of 'name: value'"),
    "no mapping": ("just text\n", "received 'just text'"),
    "top level": ("modle:\n  x: 3\n", "no setting 'modle'", "'model'"),
    "trainer": ("trainer: {max_step: 3}\n", "trainer has no setting 'max_step'", "'max_steps'"),
    "model": (GRPO + "image_siz: 3\n", "bad.yaml: model (lightning_modules.GRPOPolicy)", "'image_size'"),
    "record": (GRPO + "rollout: {guidance: {scall: 3}}\n", "bad.yaml: model.rollout.guidance", "'scale'"),
    "reward": (
        GRPO
        + "rewards: {alignment: {class_path: demo.scorers.rewards.AttributeReward, init_args: {verifir: judge}}}\n",
        "model.rewards (demo.scorers.rewards.AttributeReward) has no setting 'verifir'",
        "'verifier'",
    ),
    "class": (
        GRPO.replace("GRPOPolicy", "GRPOPolcy") + "seed: 1\n",
        "has no class 'GRPOPolcy'",
        "GRPOPolicy'",
    ),
    "mapping": (GRPO + "rewards: 3\n", "bad.yaml: model.rewards must be a mapping, received '3'"),
    "list": ("model: [1]\n", "model must be a class path of a LightningModule"),
    "fraction": ("trainer: {max_steps: 1.5}\n", "trainer.max_steps must be an integer, received '1.5'"),
    "choice": (GRPO + "objective: {kind: guraded}\n", "one of clipped, guarded, nft", "'guarded'"),
    "interpolation": (
        'run: {name: "${run.dri}"}\n',
        "refers to ${run.dri}: run has no setting 'dri'",
        "'dir'",
    ),
}


@pytest.mark.usefixtures("only_fit")
@pytest.mark.parametrize("case", FILES)
def test_bad_file_is_one_message_before_any_model(case, capsys, tiny_path, tmp_path):
    content, *expected = FILES[case]
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    text = complaint(capsys, good(tiny_path, tmp_path, f"--config={path}"))
    for words in expected:
        assert words in text


@pytest.mark.usefixtures("only_fit")
def test_mistake_in_the_code_of_a_users_class_is_a_message(monkeypatch, capsys, tiny_path, tmp_path):
    (tmp_path / "their_rewards.py").write_text("def broken(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = complaint(capsys, good(tiny_path, tmp_path, "--model.rewards.mine=their_rewards.Mine"))
    assert "their_rewards.py, line 1: invalid syntax" in text


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fti", "--config", TEACHER], "Did you mean 'fit'?"),
        ([], "train.py fit | validate | test | predict | curate"),
        (["fit", "--run.name=x"], "Nothing says what data and model should be"),
    ],
    ids=["misspelt", "none", "nothing else"],
)
def test_bad_subcommand(args, expected, capsys):
    assert expected in complaint(capsys, args)


@pytest.mark.usefixtures("only_fit")
def test_missing_settings_are_named(capsys, tmp_path):
    path = tmp_path / "half.yaml"
    path.write_text(GRPO + "image_size: 32\ndata: {class_path: datamodules.PromptDataModule}\n")
    text = complaint(capsys, ["fit", f"--config={path}", f"--run.dir={tmp_path}"])
    assert "needs model.model_path, model.rewards, model.optimizer" in text


@pytest.mark.usefixtures("only_fit")
def test_reward_file_that_is_missing_is_named(monkeypatch, capsys, tiny_path, tmp_path):
    def load(cls, name):
        raise FileNotFoundError(f"{name}.safetensors is missing: train it.")

    monkeypatch.setattr(Verifier, "load", classmethod(load))
    assert "annotator.safetensors is missing" in complaint(capsys, good(tiny_path, tmp_path))


@pytest.mark.usefixtures("only_fit")
def test_fault_in_the_code_keeps_its_traceback(monkeypatch, tiny_path, tmp_path):
    def load(cls, name):
        raise AttributeError("a bug")

    monkeypatch.setattr(Verifier, "load", classmethod(load))
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
    stack = ["--config", "configs/objective/clipped.yaml", "--config", "configs/adapter/lora.yaml"]
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
