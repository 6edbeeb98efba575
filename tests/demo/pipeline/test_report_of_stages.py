"""The demo's report from fabricated stage outputs: planted scores must come out, and the page must be whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from demo.pipeline.recipe import Plan, stages
from demo.pipeline.report import TREES, build_report
from flow_rl.evaluation import BenchTree, write_report
from flow_rl.evaluation.grids import to_png
from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rewards.spec import RewardSpec

CATEGORIES = {"t2i": ("portrait", "plant", "creature", "landscape", "typography"), "edit": ("portrait", "plant")}
#: planted shift of every score over the base, on the scale 1..5
SHIFTS = {
    "t2i": {"base": 0.0, "base_guided": 0.2, "t2i_teacher": 0.4, "edit_teacher": 0.0, "mix_rl": 0.2, "student": 0.4},
    "edit": {"base": 0.0, "base_guided": 0.3, "t2i_teacher": -0.1, "edit_teacher": 0.4, "mix_rl": 0.2, "student": 0.2},
}


def fabricate(plan: Plan, prompts: int = 60) -> None:
    """Score files, images, edit sources and event files as the stages would leave them."""
    generator = torch.Generator().manual_seed(0)
    edits = plan.directory / "edits"
    edits.mkdir(parents=True)
    lines = []
    for i in range(prompts):
        (edits / f"{500 + i}.png").write_bytes(to_png(torch.rand(3, 32, 32, generator=generator)))
        lines.append({"id": 500 + i, "instruction": f"edit {i}", "source": f"{500 + i}.png", "category": "plant"})
    (edits / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for task in plan.tasks:
        facets = BenchTree.load(TREES[task]).facets()
        for model in plan.tested:
            _fabricate_test(plan.test_directory(model, task), task, SHIFTS[task][model], facets, prompts)
    for model in plan.models[1:]:
        with SummaryWriter(str(plan.directory / model)) as writer:
            for step in range(20):
                writer.add_scalar("reward/mean", 3 + 0.05 * step, step)


def _fabricate_test(directory: Path, task: str, shift: float, facets: list[str], prompts: int) -> None:
    (directory / "images").mkdir(parents=True)
    prompts_rng, rng, rows, index = np.random.default_rng(3), np.random.default_rng(len(str(directory))), [], []
    for i in range(prompts):
        number, category = 500 + i, CATEGORIES[task][i % len(CATEGORIES[task])]
        shared = {"id": number, "prompt": f"a {category} in a long description, number {i}", "category": category}
        hard = prompts_rng.uniform(1.5, 3.5)
        for member in range(2):
            noise = rng.normal(scale=0.04)
            scores = dict.fromkeys(facets, round(float(np.clip(hard + shift + noise, 1, 5)), 4))
            rows.append(shared | {"member": member, "scores": scores})
        image = torch.full((3, 32, 32), 0.3 + shift)
        image[i % 3, 8:24, 8:24] = 0.9
        (directory / "images" / f"{number}_0.png").write_bytes(to_png(image))
        index.append(shared | {"member": 0, "file": f"{number}_0.png"})
    for path, lines in ((directory / "test_scores.jsonl", rows), (directory / "images" / "index.jsonl", index)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make(plan: Plan):
    fabricate(plan)
    commands = [stage.command for stage in stages(plan)]
    seconds = {stage.name: 30.0 + 10 * i for i, stage in enumerate(stages(plan)) if stage.name != "reward"}
    return build_report(plan, seconds=seconds, commands=commands, left_out={"reward": "'demo/vlm' is not there"})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return make(Plan(directory=tmp_path_factory.mktemp("demo"), selection="all"))


def test_planted_gains_come_out(report):
    for task, last in (("t2i", 10.0), ("edit", 5.0)):
        overall = report.gains[task]["overall"]
        assert overall.mean == pytest.approx(last, abs=0.8)  # 0.4 on 1..5 is 10 points
        assert overall.n == 60
        assert set(report.gains[task]) == {"overall", *CATEGORIES[task]}


def test_claims_say_what_was_planted(report):
    verdicts = {claim.text: claim.verdict for claim in report.claims}
    assert verdicts == {
        "The text-to-image teacher is better than the base.": "holds",
        "The editing teacher is better than the base.": "holds",
        "The student has at least 90% of the text-to-image teacher's gain.": "holds",
        "The student has at least 90% of the editing teacher's gain.": "fails",
        "The student, without guidance, is better at text-to-image than the base without guidance.": "holds",
        "The student, without guidance, is better at text-to-image than the guided base.": "holds",
        "The student, without guidance, is better at editing than the base without guidance.": "holds",
        "The student, without guidance, is better at editing than the guided base.": "fails",
        "The student beats Mix-RL on the mean of both tasks.": "holds",
    }


def test_arena_orders_the_planted_models(report):
    elo = {name: rating.elo for name, rating in report.arena["t2i"].items()}
    assert min(elo["t2i_teacher"], elo["student"]) > elo["mix_rl"] > elo["base"]
    assert set(report.arena_categories["edit"]) == set(CATEGORIES["edit"])


def test_edit_cards_show_their_source(report):
    edits = [grid for grid in report.grids if grid.category.startswith("edits")]
    assert all(row.source is not None for grid in edits for row in grid.rows)
    assert all(set(row.images) == set(report.models) for grid in report.grids for row in grid.rows)


def test_json_has_the_promised_schema(report, tmp_path):
    data = json.loads(write_report(report, tmp_path)[1].read_text())
    assert data["models"] == ["base", "t2i_teacher", "edit_teacher", "mix_rl", "student"]
    pillar = data["bench"]["t2i"]["alignment"]["student"]
    assert set(pillar) == {"mean", "low", "high", "n"}
    assert set(data["bench"]["edit"]) == {"instruction following", "identity", "preservation", "quality", "overall"}
    assert set(data["arena"]["edit"]["mix_rl"]) == {"elo", "low", "high"}
    assert data["seconds"]["mix_rl"] > 0


def test_what_is_missing_is_said(report):
    assert "Left out: reward, because 'demo/vlm' is not there." in report.notes


def test_a_quick_run_says_what_it_cannot_show(tmp_path):
    report = make(Plan(directory=tmp_path, selection="t2i", quick=True))
    assert report.models == ["base", "t2i_teacher"]
    assert "cannot show" in report.summary[0]
    assert [box.name for box in report.pipeline] == ["base", "t2i_teacher"]


def test_what_the_reward_model_reached_is_in_the_report(tmp_path) -> None:
    spec = RewardSpec(
        rubrics={},
        reading=ReadingSettings(),
        digit_token_ids=(1, 2, 3, 4, 5),
        validation={"alignment": {"srcc": 0.75, "plcc": None}},
        base="demo/vlm",
    )
    plan = Plan(directory=tmp_path, selection="t2i")
    fabricate(plan)
    (tmp_path / "reward" / "export").mkdir(parents=True)
    spec.write(tmp_path / "reward" / "export")
    found = [build_report(plan, seconds=seconds, commands=[], left_out={}) for seconds in ({"reward": 1.0}, {})]
    assert [report.reward_model for report in found] == [{"alignment": {"srcc": 0.75}}, {}]
