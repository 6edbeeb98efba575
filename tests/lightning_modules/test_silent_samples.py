"""Samples that teach nothing: an update is what the others would give alone, and a run of nothing else stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from callbacks import RewardRangeFilter
from flow_rl.errors import RunStopped
from flow_rl.rewards import Reward, Samples
from flow_rl.rl.reward_weights import GroupFilter
from lightning_modules import GRPOPolicy
from tests.planted import Brightness


class Refuse(GroupFilter):
    """Refuses the groups of an iteration but the first."""

    def keep(self, iteration_scores: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        return groups == groups[0]


class Watch(Callback):
    """Notes the gradients of every optimizer step, and the weights at the end; refuses groups if it is told to."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.refuse = refuse
        self.gradients: list[list[Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: GRPOPolicy, stage: str) -> None:
        if self.refuse:
            pl_module.group_filters.append(Refuse())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])

    def on_train_batch_end(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Constant(Reward):
    """Gives every image the same."""

    def score(self, samples: Samples) -> Tensor:
        return torch.full((len(samples),), 3.0)


class OnePromptOnly(Reward):
    """Tells apart the images of one prompt, and gives all others the same."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def score(self, samples: Samples) -> Tensor:
        bright = Brightness().score(samples)
        mine = torch.tensor([prompt == self.prompt for prompt in samples.prompts])
        return bright.where(mine, 3.0)


def trainer(directory: Path, steps: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[*callbacks], logger=False, limit_val_batches=0,
        default_root_dir=directory, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip


OBJECTIVES = {
    "nft": {"updates": 2, "old_decay": 0.5, "old_decay_growth": 0.5, "reference_weight": 0.1},
    "clipped": {"updates": 2, "clip_range": 0.01, "kl_weight": 0.5, "step_weights": "noise"},
    "guarded": {"updates": 2, "kl_weight": 0.5},
}


@pytest.mark.parametrize("how", ["refused", "flat"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_update_is_that_of_the_samples_that_teach(policy, data, tmp_path, monkeypatch, kind: str, how: str) -> None:
    """In the second update the policy has left its old self and the reference: there advantage 0 is not silent."""
    settings = {"objective": OBJECTIVES[kind] | {"micro_batch_size": 4}, "gradient_clip": 1e9}
    prompts = data()
    # The first prompt of the first batch, alone.
    batch = next(iter(prompts.train_dataloader()))
    whole, alone = Watch(refuse=how == "refused"), Watch()
    reward = Brightness() if how == "refused" else OnePromptOnly(batch.texts[0])
    trainer(tmp_path, 2, whole).fit(policy(kind, rewards={"some": reward}, **settings), prompts)

    only = policy(kind, rewards={"some": Brightness()}, **settings)
    step = only.training_step
    monkeypatch.setattr(only, "training_step", lambda batch, batch_idx: step(batch.select([0]), batch_idx))
    trainer(tmp_path, 2, alone).fit(only, data())

    assert len(whole.gradients) == len(alone.gradients) == 2
    for found, expected in zip(whole.gradients, alone.gradients, strict=True):
        scale = max(float(gradient.abs().max()) for gradient in expected)
        assert scale > 0
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 * scale)
    assert whole.logged[0]["update/loss"] == pytest.approx(alone.logged[0]["update/loss"], rel=1e-4, abs=1e-6)
    assert whole.logged[0]["advantage/teaching"] == 0.5


@pytest.mark.parametrize("kind", ["nft", "clipped"])
def test_an_iteration_without_a_signal_leaves_the_weights_alone(policy, data, tmp_path, kind: str) -> None:
    """Also those that momentum, weight decay or the pull to a reference would move."""

    class GoesFlat(Brightness):
        def score(self, samples: Samples) -> Tensor:
            scores = super().score(samples)
            return scores if module.iteration == 0 else torch.full_like(scores, 2.0)

    weights: list[list[Tensor]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
            weights.append([p.detach().clone() for p in pl_module.parameters() if p.requires_grad])

    objective = {"nft": {"reference_weight": 0.1}, "clipped": {"kl_weight": 0.5}}[kind]
    module = policy(kind, rewards={"some": GoesFlat()}, objective=objective | {"updates": 2})
    run = trainer(tmp_path, 6, Keep())
    run.fit(module, data())
    assert run.global_step == 6  # steps that are left out are counted
    before = policy(kind)
    before.configure_model()
    start = [p for p in before.parameters() if p.requires_grad]
    assert any(not torch.equal(one, other) for one, other in zip(start, weights[0], strict=True))
    for later in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(weights[0], later, strict=True))


def test_constant_rewards_stop_the_run_and_keep_its_checkpoints(policy, data, tmp_path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, save_last=True)
    module = policy("nft", rewards={"some": Constant()}, max_silent=3)
    with pytest.raises(RunStopped, match=r"iteration 2: .*'some' gave 3 to every image"):
        trainer(tmp_path, 10, saver).fit(module, data())
    assert (tmp_path / "last.ckpt").is_file()
    # A run that resumes does not start to count anew.
    with pytest.raises(RunStopped, match=r"iteration 2: the last 3 iterations"):
        trainer(tmp_path, 10).fit(
            policy("nft", rewards={"some": Constant()}, max_silent=3), data(), ckpt_path=tmp_path / "last.ckpt"
        )


def test_a_filter_that_gates_everything_stops_the_run(policy, data, tmp_path) -> None:
    with pytest.raises(RunStopped, match=r"RewardRangeFilter \(threshold 3\.9\) refused all 2 groups"):
        trainer(tmp_path, 10, RewardRangeFilter(3.9, online=True)).fit(policy("clipped", max_silent=2), data())


def test_patience_of_zero_is_refused(policy) -> None:
    with pytest.raises(ValueError, match=r"model\.max_silent is 0"):
        policy("nft", max_silent=0)
