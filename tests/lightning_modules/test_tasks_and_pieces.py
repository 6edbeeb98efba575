"""Edits, both tasks at once, and iterations made in chunks."""

from __future__ import annotations

import json
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Timer

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks import ImageWriter, WeightEMA
from datamodules import MixedTaskDataModule
from datamodules.edit_pairs import read_edits
from demo.making.edit_prompts import write_edits
from flow_rl.flow.guidance import Guidance
from flow_rl.monitoring.update_direction import probe_update
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.background import AsyncReward, ThreadedReward
from flow_rl.rl.settings import AdvantageSettings, RolloutSettings
from lightning_modules import GRPOPolicy
from tests.planted import Brightness
from tests.toy_policy import OBJECTIVES, LastIteration

BY_TASK = {"t2i": {"brightness": 0.5, "shared": 0.5}, "edit": {"shared": 0.25, "edits": 0.75}}


class Counting(Brightness):
    """Brightness, with a note of the tasks of every batch."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def score(self, samples: Samples) -> Tensor:
        self.tasks += [samples.task] * len(samples)
        return super().score(samples)


def run(directory: Path, steps: int, *callbacks: Callback, **changes) -> Trainer:
    arguments = {
        "accelerator": "cpu",
        "max_steps": steps,
        "callbacks": list(callbacks),
        "logger": False,
        "default_root_dir": directory,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    } | changes
    return Trainer(**arguments)


def weights(module: GRPOPolicy) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.model.transformer.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------- edits


def test_both_branches_of_guidance_see_the_source(policy, edits) -> None:
    module = policy("nft")
    module.configure_model()
    batch = edits().train.select([0, 2])  # one instruction, two sources
    branches = module.sampler.encode(module.model, batch.texts, batch.sources)
    latents = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    assert batch.texts[0] == batch.texts[1]
    for branch in (branches.conditional, branches.unconditional):
        assert torch.equal(branch.source_latents, module.model.encode_images(batch.sources))
        with torch.no_grad():
            first, second = module.model.velocity(latents, 0.5, branch)
        assert float((first - second).abs().max()) > 1e-3  # the source alone makes the difference


def test_an_edit_is_encoded_once_an_iteration(policy, edits, monkeypatch) -> None:
    module = policy("clipped", rollout={"shared_noise": True})
    module.configure_model()
    texts, encode = [], module.model.encode
    monkeypatch.setattr(module.model, "encode", lambda t, *a, **k: (texts.extend(t), encode(t, *a, **k))[1])
    batch = edits().train.select([0, 1])
    module.roll_out(batch)
    assert sorted(texts) == sorted([*batch.texts, "", ""])


@pytest.mark.parametrize("kind", ["clipped", "nft"])
def test_no_unconditional_forward_updates_an_edit(policy, edits, monkeypatch, kind: str) -> None:
    module = policy(kind)
    module.configure_model()
    module.model.transformer.train()
    batch = edits().train.select([0, 1])
    rollout = module.roll_out(batch)
    blank = [e for i in range(2) for e in module.model.encode([""], batch.sources[i : i + 1]).embeds]
    rows: list[Tensor] = []
    forward = module.model.transformer.forward

    def counted(*args, encoder_hidden_states: Tensor, **kwargs):
        rows.extend(encoder_hidden_states.unbind())
        return forward(*args, encoder_hidden_states=encoder_hidden_states, **kwargs)

    monkeypatch.setattr(module.model.transformer, "forward", counted)
    module.manual_backward = lambda loss: loss.backward()
    module.accumulate_gradients(rollout, torch.ones(6), module.prepare(rollout, 0))
    assert len(rows) >= 6
    assert not any(row.shape == b.shape and torch.equal(row, b) for row in rows for b in blank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nft", "clipped"])
def test_a_planted_reward_on_edits_rises_along_the_update(kind: str, tmp_path) -> None:
    found = [read_edits(str(write_edits(tmp_path, split, 8)), 32) for split in ("train", "validation")]
    training, held_out = (table.select(list(range(8))) for table in found)
    module = GRPOPolicy(
        model_path="demo/base",
        image_size=32,
        rewards={"brightness": Brightness()},
        optimizer=partial(torch.optim.SGD, lr=1.0),
        rollout=RolloutSettings(
            num_steps=6,
            group_size=8,
            guidance=Guidance(scale=2.5, low=0.6),
            transition="ode" if kind == "nft" else "flow_sde",
            shared_noise=kind != "nft",
        ),
        objective=OBJECTIVES[kind](micro_batch_size=64, advantage_clip=2.0),
    )
    module.configure_model()
    module.manual_backward = lambda loss: loss.backward()
    assert probe_update(module, training, held_out, step_size=0.2).rise > 0.005


# --------------------------------------------------------------------- both tasks


def test_every_sample_is_scored_by_its_own_tasks_rewards_alone(policy, mixed, tmp_path) -> None:
    rewards = {name: Counting() for name in ("brightness", "shared", "edits")}
    module = policy("nft", rewards=rewards, reward_weights=BY_TASK)
    trainer = run(tmp_path, 2, seen := LastIteration())
    trainer.fit(module, mixed)
    assert rewards["brightness"].tasks == ["t2i"] * 12  # two iterations of 2 prompts, groups of 3
    assert rewards["edits"].tasks == ["edit"] * 6
    assert sorted(rewards["shared"].tasks) == ["edit"] * 6 + ["t2i"] * 12

    last = seen.iteration
    assert last.number == 1
    assert last.tasks == ("t2i",) * 6 + ("edit",) * 3
    assert [len(images) for images in last.images] == [len(latents) for latents in last.latents] == [6, 3]
    assert last.scores.isnan().tolist() == [[False, False, True]] * 6 + [[True, False, False]] * 3
    assert last.weights[0].tolist() == [0.5, 0.5, 0.0]
    assert last.weights[8].tolist() == [0.0, 0.25, 0.75]
    sums = torch.zeros(3).index_add(0, last.groups.unique(return_inverse=True)[1], last.advantages)
    torch.testing.assert_close(sums, torch.zeros(3), atol=1e-5, rtol=0)  # three groups, each of one task

    logged = trainer.callback_metrics
    edit_rows = last.scores[6:, [1, 2]] @ torch.tensor([0.25, 0.75])
    assert float(logged["task/edit"]) == pytest.approx(float(edit_rows.mean()), abs=1e-5)
    label = f"edit/{last.categories[-1]}"
    assert float(logged[f"category/{label}"]) == pytest.approx(float(edit_rows.mean()), abs=1e-5)
    assert float(logged[f"weight_effective/{label}/edits"]) == 0.75
    assert float(logged["reward/edits/masked"]) == 0.0  # what was not asked is not masked
    assert float(logged["reward/edits/mean"]) == pytest.approx(float(last.scores[6:, 2].mean()), abs=1e-5)


def test_evaluation_covers_both_tasks(policy, mixed, tmp_path) -> None:
    rewards = {name: Counting() for name in ("brightness", "shared", "edits")}
    module = policy("nft", rewards=rewards, reward_weights=BY_TASK)
    writer = ImageWriter(str(tmp_path / "images"))
    trainer = run(tmp_path, 1, writer, logger=_logger(tmp_path))
    metrics = trainer.test(module, mixed, verbose=False)[0]
    assert {"test/shared/mean", "test/shared/edit/mean", "test/edits/edit/plant", "test/brightness/plant"} <= set(
        metrics
    )
    assert "test/edits/mean" not in metrics
    rows = [json.loads(line) for line in (tmp_path / "test_scores.jsonl").read_text().splitlines()]
    assert [(r["task"], r["id"]) for r in rows] == [(t, i) for t in ("t2i", "edit") for i in range(16, 20)]
    assert {tuple(sorted(r["scores"])) for r in rows if r["task"] == "edit"} == {("edits", "shared")}
    names = {path.name for path in (tmp_path / "images").glob("*.png")}
    assert {"16_0.png", "edit_16_0.png"} <= names
    assert len(names) == 8
    again = ImageWriter(str(tmp_path / "predicted"))
    run(tmp_path, 1, again).predict(module, mixed, return_predictions=False)
    tested, predicted = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("images", "predicted")
    )
    assert tested == predicted


def _logger(directory: Path) -> TensorBoardLogger:
    return TensorBoardLogger(directory, name="", version="", default_hp_metric=False)


# --------------------------------------------------------------------- chunks


@pytest.mark.parametrize(("kind", "updates"), [("nft", 1), ("clipped", 2)])
def test_the_cut_into_chunks_changes_nothing(policy, mixed, tmp_path, kind: str, updates: int) -> None:
    found = []
    for size in (3, 128):  # one prompt a chunk, and a task a chunk
        module = policy(
            kind,
            rollout={"batch_size": size},
            objective={"updates": updates} | ({"clip_range": 0.05} if kind == "clipped" else {}),
            optimizer=partial(torch.optim.SGD, lr=1.0),
            rewards={"brightness": ThreadedReward(Brightness())},
        )
        run(tmp_path, updates, seen := LastIteration()).fit(module, mixed)
        found.append((weights(module), seen.iteration))
    (first, few), (second, many) = found
    torch.testing.assert_close(few.scores, many.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(few.advantages, many.advantages, atol=1e-3, rtol=1e-3)
    assert few.categories == many.categories
    moved = max(float((first[name] - p).abs().max()) for name, p in weights(_fresh(policy, kind)).items())
    assert moved > 1e-4
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-2 * moved, rtol=1e-3)


def _fresh(policy, kind: str) -> GRPOPolicy:
    module = policy(kind)
    module.configure_model()
    return module


class Chained(AsyncReward):
    """Scores the first chunk at once, and the second when `release` is called: not before, unless nobody does."""

    def __init__(self) -> None:
        self.pending: list[tuple[Future[Tensor], Tensor]] = []

    def submit(self, samples: Samples) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        scores = Brightness().score(samples)
        if not self.pending:
            future.set_result(scores)
        else:
            give_up = Timer(60, lambda: future.set_exception(TimeoutError("no gradient came before the last score")))
            give_up.daemon = True
            give_up.start()
            future.add_done_callback(lambda _: give_up.cancel())
        self.pending.append((future, scores))
        return future

    def release(self) -> None:
        future, scores = self.pending[1]
        if not future.done():
            future.set_result(scores)


@pytest.mark.parametrize("batch_normalise", [False, True])
def test_gradients_of_scored_groups_do_not_wait_for_the_others(policy, data, tmp_path, batch_normalise: bool) -> None:
    reward = Chained()
    module = policy(
        "nft",
        rollout={"batch_size": 3},
        rewards={"brightness": reward},
        advantages=AdvantageSettings(batch_normalise=batch_normalise),
    )
    module.configure_model()
    losses, loss = [], module.objective.loss

    def watched(*args, **kwargs):
        losses.append(reward.pending[1][0].done())
        reward.release()
        return loss(*args, **kwargs)

    module.objective.loss = watched
    if batch_normalise:  # here every score is needed first
        original = reward.submit
        reward.submit = lambda samples: (original(samples), len(reward.pending) == 2 and reward.release())[0]
    run(tmp_path, 1).fit(module, data())
    assert losses[0] is batch_normalise


class Fails(Brightness):
    """Fails once, in the middle of an iteration."""

    def __init__(self, at: int) -> None:
        self.left = at

    def score(self, samples: Samples) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("killed")
        return super().score(samples)


class Seen(Callback):
    """Prompts of every iteration."""

    def __init__(self) -> None:
        self.ids: list[tuple[tuple[int, ...], ...]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.ids.append(tuple(part.ids for part in batch.parts))


ITERATIONS = 5


@pytest.fixture(scope="module")
def whole_run() -> dict:
    return {}


@pytest.mark.parametrize("killed_in", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 5))])
def test_a_run_killed_in_an_iteration_resumes_bit_for_bit(
    policy, data, edits, tmp_path, whole_run, killed_in: int
) -> None:
    """Parameters, optimizer, EMA, old policy, and the prompts that come."""

    def go(directory: Path, reward: Reward, checkpoint: str | None = None) -> dict:
        module = policy("nft", rewards={"brightness": reward}, rollout={"batch_size": 3}, objective={"updates": 1})
        seen, ema = Seen(), WeightEMA(decay=0.7)
        saver = ModelCheckpoint(dirpath=directory, every_n_train_steps=1, save_last="link")
        trainer = run(directory, ITERATIONS, seen, ema, saver)
        mixed = MixedTaskDataModule(data(), edits(prompts_per_step=1, seed=5))
        trainer.fit(module, mixed, ckpt_path=checkpoint)
        optimizer = trainer.optimizers[0].state_dict()["state"]
        return {
            "weights": weights(module),
            "ema": ema.shadow.state_dict(),
            "old": module.old.state_dict(),
            "optimizer": {f"{i}/{key}": value for i, state in optimizer.items() for key, value in state.items()},
            "ids": seen.ids,
            "iteration": module.iteration,
        }

    if not whole_run:
        whole_run |= go(tmp_path / "whole", Brightness())
    chunks = 3  # two prompts and an edit, each by itself
    with pytest.raises(RuntimeError, match="killed"):
        go(tmp_path / "parts", Fails(at=chunks * (killed_in - 1) + 2))
    resumed = go(tmp_path / "parts", Brightness(), str(tmp_path / "parts" / "last.ckpt"))
    assert resumed["iteration"] == ITERATIONS
    assert resumed["ids"] == whole_run["ids"][killed_in - 1 :]
    for kind in ("weights", "ema", "old", "optimizer"):
        assert resumed[kind].keys() == whole_run[kind].keys()
        assert all(torch.equal(resumed[kind][name], value) for name, value in whole_run[kind].items()), kind
