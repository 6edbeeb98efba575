"""Bad settings end in one message that names the setting, before a model loads."""

from __future__ import annotations

import pytest

from tests.cli.command_lines import TEACHER, complaint, good

pytestmark = pytest.mark.usefixtures("nothing_loads")

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
        ["--model.objective.old_decayy=0"],
        "model.objective (flow_rl.rl.objectives.NFT) has no setting 'old_decayy'",
        "'old_decay'",
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
        ["--callbacks.ema.deca=0.3"],
        "callbacks.ema (callbacks.WeightEMA) has no setting 'deca'",
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
        ["--callbacks.mine=callbacks.WeightEma"],
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
    "run directory": (["--run.dir=/proc/nowhere"], "Can't write '/proc/nowhere", "set --run.dir"),
    "reward": (["--model.reward_weights={t2i: {aligment: 0.5, quality: 0.5}}"], "names 'aligment'", "'alignment'"),
    "sum of weights": (["--model.reward_weights={t2i: {alignment: 0.5, quality: 0.2}}"], "sum to 1"),
    "image size": (["--model.image_size=33"], "33 x 33 must be multiples of 16"),
    "learning rate": (["--model.optimizer.lr=-1"], "model.optimizer", "-1"),
    "gradient clipping": (["--model.gradient_clip=0"], "model.gradient_clip is 0"),
    "adapter": (["--model.lora={rank: 0}"], "model.lora.rank is 0"),
    "ignored guidance": (["--model.rollout.cfg=none"], "the scale would be ignored"),
    "guidance": (["--model.rollout.guidance.scale=-1"], "guidance scale must be a number from 0 up"),
    "nft with noise": (["--model.rollout.transition=cps"], "NFT objective trains on ODE rollouts"),
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
        [
            "--config=configs/guidance/none.yaml",
            "--config=configs/objective/clipped.yaml",
            "--model.rollout.window.count=9",
        ],
        "model.rollout.window: Cannot",
    ),
    "callback's value": (["--callbacks.ema.decay=3"], "WeightEMA decay is 3.0"),
    "callback's name": (["--callbacks.emma.decay=0.9"], "no callback of this run has that name", "'ema'"),
    "callback to take out": (["--callbacks.prob=null"], "there is no callback 'prob' to take out", "'probe'"),
    "callback with a bad name": (["--callbacks.my-own=callbacks.Preemption"], "'my-own' can't name a callback"),
    "all callbacks": (["--callbacks=null"], "--callbacks names no callback", "configs/callbacks/none.yaml"),
    "list of callbacks beside names": (
        ["--trainer.callbacks+=callbacks.Preemption"],
        "trainer.callbacks is a list, and this run has callbacks by name (progress,",
        "--callbacks.mine=callbacks.Preemption",
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
    "syntax": ("run: {}\na: [1, 2\nb: 3\n", "bad.yaml:3: not valid YAML (column 2)"),
    "empty": ("", "bad.yaml: expected lines of 'name: value'"),
    "no mapping": ("just text\n", "received 'just text'"),
    "top level": ("modle:\n  x: 3\n", "no setting 'modle'", "'model'"),
    "trainer": ("trainer: {max_step: 3}\n", "trainer has no setting 'max_step'", "'max_steps'"),
    "model": (GRPO + "image_siz: 3\n", "bad.yaml:4: model (lightning_modules.GRPOPolicy)", "'image_size'"),
    "record": (GRPO + "rollout: {guidance: {scall: 3}}\n", "bad.yaml:4: model.rollout.guidance", "'scale'"),
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
    "mapping": (GRPO + "rewards: 3\n", "bad.yaml:4: model.rewards must be a mapping, received '3'"),
    "list": ("model: [1]\n", "model must be a class path of a LightningModule"),
    "fraction": ("trainer: {max_steps: 1.5}\n", "trainer.max_steps must be an integer, received '1.5'"),
    "choice": (GRPO + "objective: {class_path: flow_rl.rl.objectives.Guraded}\n", "has no class 'Guraded'", "Guarded'"),
    "callback's name": (
        "callbacks: {emma: {init_args: {decay: 0.9}}}\n",
        "bad.yaml: callbacks.emma names no class_path",
        "'ema'",
    ),
    "callback to take out": ("callbacks: {prob: null}\n", "bad.yaml: there is no callback 'prob'", "'probe'"),
    "callback's setting": ("callbacks: {ema: {init_args: {deca: 0.9}}}\n", "bad.yaml:1: callbacks.ema", "'decay'"),
    "list of callbacks": ("callbacks: [callbacks.Preemption]\n", "bad.yaml: callbacks must be a mapping of names"),
    "included file": ("include: missing.yaml\n", "bad.yaml includes 'missing.yaml', but there is no file"),
    "circle": ("include: bad.yaml\n", "bad.yaml: a file can't come before itself"),
    "include": ("include: 3\n", "bad.yaml: include must be a path or a list of paths, received '3'"),
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
    assert "needs model.rewards, model.objective, model.model_path, model.optimizer" in text
