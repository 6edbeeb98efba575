"""The two callbacks in whole runs: what is trained on, how it is weighed, and what a checkpoint brings back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks import CategoryWeightCalibration, RewardRangeFilter, UpdateProbe
from callbacks.range_filter import ScoreRangeFilter
from datamodules import PromptDataModule
from flow_rl.curation.provenance import prompt_digests
from flow_rl.curation.scores import CuratedScores
from flow_rl.rl.weight_adaptation import AdaptationSettings
from lightning_modules.curation import provenance_of
from tests.planted import Brightness, Dark
from tests.toy_policy import LastIteration

TABLE = {"portrait": {"bright": 0.25, "dark": 0.75}, "default": {"bright": 0.9, "dark": 0.1}}


class Record(RewardRangeFilter):
    """The filter, and the ids of every batch."""

    seen: tuple[tuple[int, ...], ...] = ()

    def on_train_batch_end(self, trainer, module, outputs, batch, *args) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, *args)
        self.seen += (batch.ids,)


def trainer(directory: Path, steps: int, *callbacks) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=CSVLogger(directory, name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )


def planted_scores(module, data, path: Path, ranges: list[float]) -> str:
    """A file whose composite ranges are known, of the module's own provenance."""
    table = data.train
    scores = torch.full((len(table), 3, len(module.rewards)), 2.0)
    scores[:, 1] += torch.tensor(ranges).unsqueeze(1)
    CuratedScores(
        ids=torch.tensor(table.ids),
        prompts=prompt_digests(table),
        categories=table.categories,
        reward_names=tuple(module.rewards),
        scores=scores,
        provenance=provenance_of(module, "t2i", members=3),
    ).save(path)
    return str(path)


RANGES = [0.1, 0.9, 0.8, 0.2, 0.7, 0.3, 0.1, 0.6, 0.2, 0.1, 0.9, 0.1]
KEPT = {1, 2, 4, 7, 10}


def test_training_sees_the_kept_prompts_alone_and_resumes_with_them(policy, data, tmp_path) -> None:
    scores = planted_scores(policy("nft"), data(), tmp_path / "s.safetensors", RANGES)

    def fit(steps: int, place: str, checkpoint: str | None = None, threshold: float = 0.5, scores: str = scores):
        found = Record(threshold=threshold, scores=scores)
        saver = ModelCheckpoint(dirpath=tmp_path / place, every_n_train_steps=2, save_last="link")
        module = policy("nft")
        trainer(tmp_path / place, steps, found, saver).fit(module, data(), ckpt_path=checkpoint)
        return module, found

    module, whole = fit(4, "whole")
    assert {i for batch in whole.seen for i in batch} == KEPT
    assert whole.selections["t2i"].categories["portrait"].kept == 3
    fit(2, "half")
    last = str(tmp_path / "half" / "last.ckpt")
    resumed_module, resumed = fit(4, "half", last)
    assert resumed.seen == whole.seen[2:]
    for a, b in zip(module.parameters(), resumed_module.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"on 5 't2i' prompts, and the filter keeps 6 now: 0 are gone, 1 are new"):
        fit(4, "half", last, threshold=0.25)
    with pytest.raises(ValueError, match=r"another choice of prompts \(.*now all of them\)"):
        trainer(tmp_path / "half", 4).fit(policy("nft"), data(), ckpt_path=last)


def test_scores_of_another_base_are_refused_unless_allowed(policy, data, tmp_path) -> None:
    scores = planted_scores(policy("nft", rollout={"num_steps": 5}), data(), tmp_path / "s.safetensors", RANGES)
    with pytest.raises(ValueError, match=r"num_steps \(5 then, 4 now\).*allow_stale"):
        trainer(tmp_path, 1, RewardRangeFilter(0.5, scores)).fit(policy("nft"), data())
    with pytest.raises(ValueError, match=r"leaves nothing of 'plant', 'portrait'.*\n.*widest range is 0.900"):
        trainer(tmp_path, 1, RewardRangeFilter(0.95, scores, allow_stale=True)).fit(policy("nft"), data())
    with pytest.raises(ValueError, match="prompts_per_step is 6"):
        trainer(tmp_path, 1, RewardRangeFilter(0.5, scores, allow_stale=True)).fit(
            policy("nft"), data(prompts_per_step=6)
        )
    with pytest.raises(ValueError, match="No curated scores"):
        trainer(tmp_path, 1, RewardRangeFilter(0.5, "nowhere.safetensors")).fit(policy("nft"), data())


def test_missing_scores_are_made_before_the_first_batch(policy, data, tmp_path) -> None:
    found = Record(threshold=0.0, scores=str(tmp_path / "made.safetensors"), sample_missing=True, batch_size=5)
    module = policy("nft")
    trainer(tmp_path, 1, found).fit(module, data())
    made = CuratedScores.load(tmp_path / "made.safetensors")
    assert made.scores.shape == (12, 3, 1)
    assert len(found.seen) == 1
    assert module.model.transformer.training  # as it was found


def test_gate_equals_a_loop_over_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 1 + 4 * torch.rand(24, 2, generator=generator)
    scores[torch.rand(24, 2, generator=generator) < 0.4] = torch.nan
    groups = torch.tensor([5, 9, 1, 40, 2, 7]).repeat(4)
    weights = torch.tensor([[0.3, 0.7]]).expand(24, 2)
    expected = torch.zeros(24, dtype=torch.bool)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        composite = []
        for row in rows:
            valid = [k for k in range(2) if not scores[row, k].isnan()]
            if valid:
                total = sum(weights[row, k] for k in valid)
                composite.append(float(sum(weights[row, k] * scores[row, k] for k in valid) / total))
        expected[rows] = len(composite) >= 2 and max(composite) - min(composite) > 1.5
    assert 0 < expected.sum() < 24
    assert torch.equal(ScoreRangeFilter(1.5).keep(scores, weights, groups), expected)


def test_online_gate_skips_without_changing_the_forwards(policy, data, tmp_path) -> None:
    forwards, advantages = [], []
    for threshold in (0.0, 3.9):
        module = policy("nft", rewards={"bright": Brightness()})
        run = trainer(tmp_path / str(threshold), 1, RewardRangeFilter(threshold, online=True), seen := LastIteration())
        module.configure_model()
        counted = [0]
        module.model.transformer.register_forward_hook(
            lambda *_a, counted=counted: counted.__setitem__(0, counted[0] + 1)
        )
        run.fit(module, data())
        forwards.append(counted[0])
        advantages.append(seen.iteration.advantages)
        skipped = run.logged_metrics["filter/skipped"]
        assert float(skipped) == (0.0 if threshold == 0 else 1.0)
    assert forwards[0] == forwards[1] > 0
    assert advantages[0].abs().max() > 0
    assert torch.equal(advantages[1], torch.zeros_like(advantages[1]))


def test_a_filter_that_does_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="would filter nothing"):
        RewardRangeFilter(0.5)
    with pytest.raises(ValueError, match="threshold is 4"):
        RewardRangeFilter(4.0, online=True)


@pytest.mark.parametrize(
    "adapt",
    [pytest.param(None, marks=pytest.mark.slow), AdaptationSettings(rate=0.5, radius=0.05)],
    ids=["fixed", "adaptive"],
)
def test_table_weighs_the_run_and_comes_back_from_a_checkpoint(policy, data, tmp_path, adapt) -> None:
    def fit(steps: int, place: str, checkpoint: str | None = None, table=TABLE):
        found = CategoryWeightCalibration(table, adapt)
        saver = ModelCheckpoint(dirpath=tmp_path / place, every_n_train_steps=2, save_last="link")
        module = policy("nft", rewards={"bright": Brightness(), "dark": Dark()})
        run = trainer(tmp_path / place, steps, found, saver, seen := LastIteration())
        run.fit(module, data(prompts_per_step=4), ckpt_path=checkpoint)
        return module, seen.iteration, found, run

    module, iteration, whole, run = fit(4, "whole")
    if adapt is None:
        for row, category in zip(iteration.weights.tolist(), iteration.categories, strict=True):
            assert row == pytest.approx([0.25, 0.75] if category == "portrait" else [0.9, 0.1])
    else:
        table = whole.source.tables["t2i"].values
        moved = (whole.source.current["t2i"] - table).abs()
        assert 0 < moved.max() <= 0.05 + 1e-9
        torch.testing.assert_close(whole.source.current["t2i"].sum(1), torch.ones(2, dtype=torch.float64))
    for category in set(iteration.categories):
        rows = [n for n, c in enumerate(iteration.categories) if c == category]
        masked = iteration.scores[rows, 1].isnan()
        share = torch.where(masked, 0.0, iteration.weights[rows, 1]).mean()
        assert float(run.logged_metrics[f"weight_effective/{category}/dark"]) == pytest.approx(float(share), abs=1e-6)
    fit(2, "half")
    last = str(tmp_path / "half" / "last.ckpt")
    resumed_module, _, resumed, _ = fit(4, "half", last)
    assert torch.equal(resumed.source.current["t2i"], whole.source.current["t2i"])
    assert torch.equal(resumed.means["t2i"], whole.means["t2i"]) or adapt is None
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed_module.parameters(), strict=True))
    with pytest.raises(ValueError, match="another weight table"):
        fit(4, "half", last, {"default": {"bright": 0.5, "dark": 0.5}})


def test_a_category_of_the_validation_prompts_alone_has_its_weights(policy, prompt_files, tmp_path) -> None:
    """The probe weighs held-out prompts: their categories belong to the table as well."""
    rare = tmp_path / "validation.jsonl"
    rows = [{"id": 900 + n, "prompt": "a red pot", "category": "rare"} for n in range(2)]
    rare.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = {"portrait": {"brightness": 1.0}, "plant": {"brightness": 1.0}}
    held_out = PromptDataModule(**prompt_files | {"validation_file": str(rare)}, prompts_per_step=2)
    with pytest.raises(ValueError, match="no row for rare"):
        trainer(tmp_path, 1, CategoryWeightCalibration(table), UpdateProbe(prompts=2)).fit(policy("nft"), held_out)
    table["rare"] = {"brightness": 1.0}
    run = trainer(tmp_path, 1, CategoryWeightCalibration(table), UpdateProbe(prompts=2))
    run.fit(policy("nft"), held_out)
    assert run.global_step == 1


def test_wrong_table_ends_before_the_first_batch(policy, data, tmp_path) -> None:
    for table, words in [
        ({"plnat": {"brightness": 1.0}}, "Did you mean 'plant'"),
        ({"default": {"brihtness": 1.0}}, "Did you mean 'brightness'"),
        ({"edit": {"default": {"brightness": 1.0}}}, "the data have 't2i' prompts, too"),
    ]:
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, 1, CategoryWeightCalibration(table)).fit(policy("nft"), data())
