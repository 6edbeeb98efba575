"""The monitor in whole runs: it watches without touching them, alerts, acts, and resumes as if nothing had happened."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import ConcatDataset, DataLoader

from callbacks import HackingMonitor
from callbacks.hacking_monitor import panel_prompts
from datamodules import PromptDataModule
from demo.scorers.rewards import AttributeReward, QualityReward
from flow_rl.flow.guidance import Guidance
from flow_rl.monitoring.hacking import Band
from flow_rl.rewards import Reward, Samples
from flow_rl.rl.objectives import NFT
from flow_rl.rl.settings import RolloutSettings
from lightning_modules import GRPOPolicy
from tests.planted import Brightness


class Darkness(Reward):
    """5 for black, 1 for white; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, samples: Samples) -> torch.Tensor:
        self.asked += len(samples)
        return 5 - 4 * samples.images.float().mean(dim=(1, 2, 3))

    def statistics(self) -> dict[str, float]:
        asked, self.asked = self.asked, 0
        return {"asked": float(asked)}


class Failing(Reward):
    """Always down."""

    def score(self, samples: Samples) -> torch.Tensor:
        raise ConnectionError("nobody there")


def fit(directory: Path, module, data, iterations: int, *callbacks, checkpoint: str | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=iterations,
        callbacks=list(callbacks),
        logger=TensorBoardLogger(directory, name="", version="", default_hp_metric=False),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


def weights(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.model.transformer.parameters()]


def monitor(**changes) -> HackingMonitor:
    """Few prompts make no test significant: let nearly everything pass for it."""
    return HackingMonitor(**({"every": 1, "prompts": 4, "members": 2, "margin": 0.0, "error_rate": 0.99} | changes))


@pytest.fixture
def hacked(policy):
    """A run whose reward is brightness, watched by what likes darkness."""
    return lambda **changes: policy(
        "nft", monitors={"dark": Darkness()}, optimizer=partial(torch.optim.AdamW, lr=3e-3), **changes
    )


def test_a_watched_run_is_the_run_itself(policy, data, tmp_path):
    plain, watched = policy("nft"), policy("nft", monitors={"dark": Darkness()})
    fit(tmp_path / "plain", plain, data(), 3)
    fit(tmp_path / "watched", watched, data(), 3, HackingMonitor(every=1, prompts=4, rollouts=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(watched), strict=True))


def test_looks_begin_before_training_and_show_the_validation_images(hacked, data, tmp_path):
    module, panel = hacked(), HackingMonitor(every=2, prompts=3, members=2, rollouts=True)
    fit(tmp_path, module, data(), 5, panel)
    assert [look.iteration for look in panel.looks] == [0, 2, 4]
    first = panel.looks[0]
    assert first.unconditional_drift.tolist() == [0.0] * 3
    assert panel.looks[-1].unconditional_drift.min() > 0
    base = hacked()
    base.configure_model()
    prompts = data().validation.select([0, 2, 3])
    images = base.sampler.images(base.model, prompts, members=2)
    torch.testing.assert_close(first.proxy[:, 0], 1 + 4 * images.mean(dim=(1, 2, 3)), rtol=0, atol=1e-6)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("monitor/panel")] == [0, 2, 4]
    assert [e.step for e in events.Scalars("monitor/rollout/panel/dark")] == [2, 4]
    # What the scorers say of the panel is of the panel's 6 images alone, and of the rollouts, of their 6.
    assert [e.value for e in events.Scalars("monitor/panel/dark/asked")] == [6.0, 6.0, 6.0]
    assert [e.value for e in events.Scalars("monitor/rollout/panel/dark/asked")] == [6.0, 6.0]
    for name in ("proxy", "brightness", "sharpness", "diversity", "latent_rms", "unconditional_drift"):
        assert len(events.Scalars(f"monitor/{name}")) == 3
    for name in ("alert", "p_hacking"):
        assert len(events.Scalars(f"monitor/{name}")) == 2


def test_an_alert_is_seen_everywhere(hacked, data, tmp_path):
    panel = monitor()
    with pytest.warns(UserWarning, match="reward hacking suspected"):
        fit(tmp_path, hacked(), data(), 4, panel)
    rows = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["kind"] == "hacking"]
    assert row["changes"]["proxy"] > 0 > row["changes"]["panel"]
    assert row["changes"]["proxy"] == pytest.approx(-row["changes"]["panel"], abs=1e-4)
    events = EventAccumulator(str(tmp_path)).Reload()
    alerting = [e.step for e in events.Scalars("monitor/alert") if e.value > 0]
    assert alerting[0] == row["iteration"]
    assert any(tag.startswith("monitor/alert") for tag in events.Tags()["tensors"])


def test_stop_ends_the_run(hacked, data, tmp_path):
    with pytest.warns(UserWarning, match="Action: stop"):
        trainer = fit(tmp_path, hacked(), data(), 30, panel := monitor(action="stop"))
    assert trainer.global_step == panel.alerts[0].iteration < 30


def test_raise_kl_multiplies_the_reference_weight_up_to_the_cap(hacked, data, tmp_path):
    module = hacked(objective={"reference_weight": 1e-3})
    with pytest.warns(UserWarning, match="Action: raise_kl"):
        fit(tmp_path, module, data(), 6, panel := monitor(action="raise_kl", kl_factor=2.0, kl_cap=3.0))
    assert panel.kl_scale == 3.0
    assert module.objective.reference_scale == 3.0
    assert module.objective.reference_weight == 1e-3


def test_a_resumed_run_alerts_as_an_uninterrupted_one(hacked, data, tmp_path):
    def run(directory: Path, iterations: int, checkpoint: str | None = None):
        module = hacked(objective={"reference_weight": 1e-3})
        panel = monitor(action="raise_kl", bands={"brightness": Band(low=-0.001, high=0.001)})
        saver = ModelCheckpoint(dirpath=directory, every_n_train_steps=3, save_last="link")
        fit(directory, module, data(), iterations, panel, saver, checkpoint=checkpoint)
        return module, panel

    whole, whole_panel = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 5)  # goes on to 5, but its last checkpoint is of 3
    resumed, resumed_panel = run(tmp_path / "parts", 6, str(tmp_path / "parts" / "last.ckpt"))
    assert whole_panel.alerts
    assert resumed_panel.alerts == whole_panel.alerts
    assert resumed_panel.kl_scale == whole_panel.kl_scale > 1
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    for found, expected in zip(resumed_panel.looks, whole_panel.looks, strict=True):
        assert torch.equal(found.panel, expected.panel)
        assert torch.equal(found.unconditional_drift, expected.unconditional_drift)
    files = [(tmp_path / name / "alerts.jsonl").read_text() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_other_prompts_after_a_resume_are_refused(hacked, data, tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last="link")
    fit(tmp_path, hacked(), data(), 1, HackingMonitor(every=1, prompts=4), saver)
    with pytest.raises(ValueError, match="watched other prompts"):
        fit(tmp_path, hacked(), data(), 2, HackingMonitor(every=1, prompts=3), checkpoint=str(tmp_path / "last.ckpt"))


def test_a_mixed_panel_has_prompts_of_both_tasks(data):
    both = ConcatDataset([data().val_dataloader().dataset] * 2)
    first, second = panel_prompts(DataLoader(both, batch_size=None), 5)
    assert first.ids == second.ids == (12, 15)  # two of each, from either end of the four
    with pytest.raises(ValueError, match="3 for 2 tasks"):
        panel_prompts(DataLoader(both, batch_size=None), 3)
    with pytest.raises(ValueError, match="holds none"):
        panel_prompts(data().train_dataloader(), 4)


def test_a_monitor_that_is_down_ends_nothing(policy, data, tmp_path):
    module = policy("nft", monitors={"down": Failing(), "dark": Darkness()})
    with pytest.warns(UserWarning, match="nobody there"):
        fit(tmp_path, module, data(), 2, panel := HackingMonitor(every=1, prompts=4))
    assert module.iteration == 2
    assert panel.looks[-1].panel[:, 0].isnan().all()
    assert not panel.looks[-1].panel[:, 1].isnan().any()


def test_what_could_never_alert_or_act_is_refused(policy, data, tmp_path):
    with pytest.raises(ValueError, match=r"model\.monitors"):
        fit(tmp_path, policy("nft"), data(), 1, HackingMonitor())
    module = policy("nft", monitors={"dark": Darkness()}, objective={"reference_weight": 0.0})
    with pytest.raises(ValueError, match="the objective has none"):
        fit(tmp_path, module, data(), 1, HackingMonitor(action="raise_kl"))
    for bad in ({"every": 0}, {"prompts": 1}, {"action": "wran"}, {"error_rate": 0.0}, {"kl_factor": 1.0}):
        with pytest.raises(ValueError, match="HackingMonitor"):
            HackingMonitor(**bad)


def test_a_planted_hack_is_caught_within_20_iterations(tmp_path):
    """The reward pays for brightness alone; the demo's monitors read attributes and soundness."""
    module = GRPOPolicy(
        model_path="demo/base",
        image_size=32,
        rewards={"brightness": Brightness()},
        monitors={"alignment": AttributeReward("monitor"), "quality": QualityReward("monitor")},
        optimizer=partial(torch.optim.AdamW, lr=6e-4),
        rollout=RolloutSettings(num_steps=4, group_size=4, guidance=Guidance(scale=1.0), cfg="none", transition="ode"),
        objective=NFT(micro_batch_size=32, reference_weight=0.0, old_decay=0.0, advantage_clip=2.0),
    )
    data = PromptDataModule(
        train_file="demo/prompts/train.jsonl",
        validation_file="demo/prompts/validation.jsonl",
        test_file="demo/prompts/test.jsonl",
        prompts_per_step=8,
    )
    with pytest.warns(UserWarning, match="reward hacking suspected"):
        fit(tmp_path, module, data, 20, panel := HackingMonitor(every=5, prompts=20, members=2, action="stop"))
    assert any(alert.kind == "hacking" for alert in panel.alerts)
