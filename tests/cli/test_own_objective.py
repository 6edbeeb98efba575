"""An objective from outside the tree is one file: named by class path, it trains, and the doctor plans it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import QwenImage21Pipeline

from cli import app

ROOT = Path(__file__).parents[2]
OWN = '''
from flow_rl.flow.objectives import velocity_matching_loss
from flow_rl.flow.noise import Stream, batch_noise
from flow_rl.flow.schedule import noise_latents
from flow_rl.rl.objectives import Objective


class Better(Objective):
    """Matches the velocity of samples that are better than their group's mean, at one noise level."""

    def __init__(self, *, level: float, **common) -> None:
        super().__init__(**common)
        self.level = level

    def check(self, settings, sigmas) -> None:
        super().check(settings, sigmas)
        if not 0 < self.level < 1:
            raise ValueError(f"model.objective.level is {self.level}; it must lie in (0, 1).")

    def pairs_per_sample(self, settings) -> int:
        return 1

    def prepare(self, model, rollout, update) -> dict:
        x_0 = rollout.trajectory.latents
        noise = batch_noise(
            tuple(x_0.shape[1:]), seed=rollout.seed, step=rollout.iteration, ids=rollout.ids, members=rollout.members,
            stream=Stream.FORWARD,
        )
        sigma = x_0.new_full((len(rollout),), self.level)
        return {"x_t": noise_latents(x_0, noise, sigma)[None], "target": (noise - x_0)[None], "sigma": sigma[None]}

    def loss(self, model, rollout, advantages, pairs, prepared, denominator, weights=None) -> tuple:
        at = {name: values[pairs.step, pairs.sample] for name, values in prepared.items()}
        velocity = model.velocity(at["x_t"], at["sigma"], rollout.conditioning.select(pairs.samples))
        better = advantages[pairs.sample].clamp_min(0)
        if weights is not None:
            better = better * weights[pairs.sample]
        loss, _ = velocity_matching_loss(velocity, at["target"], weights=better, denominator=denominator)
        return loss, {"better": (better > 0).float().mean()}
'''


@pytest.fixture
def run(tmp_path: Path, tiny_path: str, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "own_objectives.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "own_objectives", None)
    monkeypatch.delitem(sys.modules, "own_objectives")
    monkeypatch.chdir(ROOT)
    (tmp_path / "own.yaml").write_text(
        "model:\n  init_args:\n    objective:\n      class_path: own_objectives.Better\n"
        "      init_args: {level: 0.5}\n",
        encoding="utf-8",
    )
    return [
        "--config=configs/demo/t2i_teacher.yaml",
        f"--config={tmp_path / 'own.yaml'}",
        f"--model.model_path={tiny_path}",
        "--model.rewards={brightness: {class_path: tests.planted.Brightness}}",
        "--model.reward_weights={brightness: 1.0}",
        *(f"--data.{name}={path}" for name, path in prompt_files.items()),
        "--data.prompts_per_step=2",
        f"--run.dir={tmp_path}",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=0",
    ]


def test_it_trains_two_steps(run: list[str], tmp_path: Path, tiny_path: str) -> None:
    app.main(["fit", *run])
    before, after = (
        QwenImage21Pipeline.from_pretrained(path).transformer.state_dict()
        for path in (tiny_path, tmp_path / "t2i_teacher" / "export")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_its_own_check_ends_the_run_before_it_begins(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["fit", *run, "--model.objective.level=1.5"])
    assert "model.objective.level is 1.5; it must lie in (0, 1)." in capsys.readouterr().err


def test_the_doctor_plans_it(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    app.main(["doctor", *run])
    out = capsys.readouterr().out
    assert "training" in out
    assert "old policy" not in out  # a second set of weights that this objective does not have
