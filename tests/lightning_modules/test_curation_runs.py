"""Curating for real: every prompt once, killed and resumed, on one rank and on two, refused where it is stale."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from callbacks.stop_signals import StopSignals
from cli.curate import curate
from datamodules import PromptDataModule
from flow_rl.curation.scores import CuratedScores
from flow_rl.curation.settings import CurationSettings
from flow_rl.rewards import Reward, Samples
from flow_rl.stop_signal import StopAsked, forget
from lightning_modules import GRPOPolicy
from lightning_modules.curation import CURATION_STEP, CurationRun, score_groups
from tests.planted import Brightness
from tests.processes import finish, launch, start
from tests.toy_policy import toy_policy


class Counting(Reward):
    """Brightness, and how many images it saw; at a given image, something happens."""

    not_in_fingerprint = frozenset({"at", "act"})

    def __init__(self, at: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.at, self.act = at, act
        self._seen = 0

    def score(self, samples: Samples) -> torch.Tensor:
        self._seen += len(samples)
        if 0 <= self.at < self._seen:
            self.act()
        return Brightness().score(samples)


def run(policy: GRPOPolicy, data, path: Path, trainer: Trainer | None = None, **changes) -> CuratedScores:
    settings = CurationSettings(**{"scores": str(path), "threshold": 0.0, "batch_size": 2} | changes)
    trainer = trainer or Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    curate(trainer, policy, data, settings)
    return CuratedScores.load(path)


@pytest.fixture
def bright(policy) -> Callable[..., GRPOPolicy]:
    return lambda reward=None, **changes: policy("nft", rewards={"bright": reward or Counting()}, **changes)


@pytest.fixture
def whole(bright, data, tmp_path) -> CuratedScores:
    """Scores of all 12 prompts, 3 images each, in one go."""
    return run(bright(), data(), tmp_path / "whole" / "scores.safetensors")


def test_every_prompt_is_scored_by_keyed_noise(bright, data, whole) -> None:
    assert whole.ids.tolist() == list(range(12))
    assert whole.scores.shape == (12, 3, 1)
    assert whole.categories == data().train.categories
    module = bright()
    module.configure_model()
    batch = data().train.select([7, 2])  # another batch, another order
    torch.testing.assert_close(score_groups(module, batch, 3), whole.scores[[7, 2]], atol=1e-5, rtol=0)
    assert (whole.scores.amax(1) - whole.scores.amin(1)).min() > 0
    assert CURATION_STEP < 0  # no iteration of training has this noise


def _killed(model: str, prompts: dict[str, str], path: Path) -> None:
    kill = Counting(at=20, act=lambda: os.kill(os.getpid(), signal.SIGKILL))  # in the fourth batch of six images
    run(toy_policy(model, rewards={"bright": kill}), PromptDataModule(**prompts, prompts_per_step=2), path)


def test_killed_process_loses_nothing(bright, tiny_path, prompt_files, data, whole, tmp_path) -> None:
    path = tmp_path / "killed" / "scores.safetensors"
    # Never a fork of this process: its threads may hold locks.
    assert finish(start(_killed, 1, tiny_path, prompt_files, path)) == [-signal.SIGKILL]
    assert not path.exists()
    assert len(list(path.parent.glob("*.parts/*.safetensors"))) == 3
    counting = Counting()
    resumed = run(bright(counting), data(), path)
    assert counting._seen == 36 - 18
    assert torch.equal(resumed.scores, whole.scores)
    assert path.read_bytes() == (tmp_path / "whole" / "scores.safetensors").read_bytes()
    assert list(path.parent.glob("*.parts")) == []


def test_a_stop_is_obeyed_before_the_next_batch(bright, data, whole, tmp_path) -> None:
    path = tmp_path / "stopped" / "scores.safetensors"
    stop = Counting(at=1, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[StopSignals()])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopAsked):
        run(bright(stop), data(), path, trainer)
    signal.signal(signal.SIGTERM, before)
    forget()
    assert stop._seen == 6, "one batch of two prompts, three images each"
    assert torch.equal(run(bright(), data(), path).scores, whole.scores)


def test_another_threshold_samples_nothing(bright, data, whole, tmp_path, capsys, monkeypatch) -> None:
    path, counting = tmp_path / "whole" / "scores.safetensors", Counting()
    ranges = (whole.scores.amax(1) - whole.scores.amin(1)).flatten()
    middle = float(ranges.median())
    monkeypatch.setattr(
        "lightning_modules.grpo_policy.load_image_model", lambda *_a, **_k: pytest.fail("a model loaded")
    )
    run(bright(counting), data(), path, threshold=middle, propose=str(tmp_path / "weights.yaml"))
    assert counting._seen == 0
    report = json.loads((path.parent / "scores.json").read_text())
    expected = [i for i in range(12) if ranges[i] > middle]
    assert report["kept_ids"] == expected
    assert report["all"]["kept"] == len(expected) == sum(c["kept"] for c in report["categories"].values())
    assert sum(report["all"]["histogram"]["counts"]) == 12
    assert "portrait" in capsys.readouterr().out
    page = (path.parent / "scores.html").read_text()
    assert page.count("<svg") > 6
    assert "default" in (tmp_path / "weights.yaml").read_text()
    with pytest.raises(ValueError, match="leaves nothing of 'plant', 'portrait'"):
        run(bright(), data(), path, threshold=3.9)


def test_new_prompts_alone_are_sampled(bright, whole, prompt_files, tmp_path) -> None:
    path, counting = tmp_path / "whole" / "scores.safetensors", Counting()
    longer = tmp_path / "longer.jsonl"
    rows = [json.loads(line) for line in Path(prompt_files["train_file"]).read_text().splitlines()]
    rows[4]["prompt"] = "a blue pot"
    rows.append({"id": 50, "prompt": "a red pot", "category": "plant"})
    longer.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    found = run(
        bright(counting), PromptDataModule(**(prompt_files | {"train_file": str(longer)}), prompts_per_step=2), path
    )
    assert counting._seen == 2 * 3
    assert found.ids.tolist() == [*range(12), 50]
    same = [i for i in range(12) if i != 4]
    assert torch.equal(found.scores[same], whole.scores[same])
    assert not torch.equal(found.scores[4], whole.scores[4])


def _on_two_ranks(model: str, prompts: dict[str, str], path: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False)
    data = PromptDataModule(**prompts, prompts_per_step=2)
    curate(
        trainer,
        toy_policy(model, rewards={"bright": Counting()}),
        data,
        CurationSettings(scores=str(path), threshold=0.0, batch_size=2),
    )


@pytest.mark.dist
def test_two_ranks_make_the_same_file(tiny_path, prompt_files, whole, tmp_path) -> None:
    path = tmp_path / "two" / "scores.safetensors"
    launch(_on_two_ranks, 2, tiny_path, prompt_files, path)
    found = CuratedScores.load(path)
    assert torch.equal(found.scores, whole.scores)
    assert path.read_bytes() == (tmp_path / "whole" / "scores.safetensors").read_bytes()


def test_scores_of_something_else_are_not_added_to(bright, data, whole, tmp_path) -> None:
    path = tmp_path / "whole" / "scores.safetensors"
    for changed, words in [
        (bright(rollout={"num_steps": 5}), r"model.rollout.num_steps \(4 then, 5 now\)"),
        (bright(Brightness()), "reward 'bright'"),
        (bright(seed=3), r"seed \(0 then, 3 now\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(changed, data(), path)
    with pytest.raises(ValueError, match=r"members \(3 then, 5 now\)"):
        run(bright(), data(), path, members=5)


def test_what_cannot_be_curated_is_said(bright, data, tmp_path) -> None:
    with pytest.raises(ValueError, match="needs a GRPOPolicy"):
        curate(Trainer(accelerator="cpu", logger=False), CurationRun, data(), CurationSettings(scores="x"))
    for changes, words in [({"members": 1}, "at least 2"), ({"threshold": 4.0}, "threshold"), ({"batch_size": 0}, "1")]:
        with pytest.raises(ValueError, match=words):
            CurationSettings(scores="x", **changes)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="no file of curated scores"):
        CuratedScores.load(tmp_path / "bad.safetensors")
