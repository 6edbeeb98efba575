"""The demo's report from fabricated stage outputs: planted scores must come out, and the page must be whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from demo.pipeline.agreement import TRUTHS, measured_rows
from demo.pipeline.recipe import Plan, stages
from demo.pipeline.report import TREES, build_report
from flow_rl.evaluation import BenchTree, write_report
from flow_rl.evaluation.grids import to_png
from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rewards.spec import RewardSpec

CATEGORIES = {"t2i": ("portrait", "plant", "creature", "landscape", "typography"), "edit": ("portrait", "plant")}
#: planted shift of every score over the base, on the scale 1..5
SHIFTS = {
    "t2i": {
        "base": 0.0, "base_guided": 0.2, "t2i_teacher": 0.4, "t2i_teacher_unguided": 0.2, "edit_teacher": 0.0,
        "t2i_teacher_verifier": 0.6, "mix_rl": 0.2, "mix_rl_unguided": 0.5, "student": 0.4,
    },
    "edit": {
        "base": 0.0, "base_guided": 0.3, "t2i_teacher": -0.1, "edit_teacher": 0.4, "edit_teacher_unguided": 0.1,
        "edit_teacher_verifier": 0.4, "mix_rl": 0.2, "mix_rl_unguided": 0.5, "student": 0.2,
    },
}  # fmt: skip
#: the guided teacher of the task draws these categories and facets worse than the guided base
FALLEN = {("t2i", "t2i_teacher"): "typography", ("edit", "edit_teacher"): "judge/identity"}
ALERT = {"message": "Iteration 16: reward hacking suspected."}


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
        facets = sorted({*BenchTree.load(TREES[task]).facets(), *sum(TRUTHS[task].values(), ())})
        for row in plan.rows:
            if task in row.tasks:
                _fabricate_test(plan, task, row.name, facets, prompts)
    for model in plan.trained:
        with SummaryWriter(str(plan.directory / model)) as writer:
            for step in range(20):
                writer.add_scalar("reward/mean", 3 + 0.05 * step, step)
            if model != "student":
                for look in range(3):
                    writer.add_scalar("monitor/proxy", 3 + 0.2 * look, 16 * look)
                    writer.add_scalar("monitor/panel", 3 - 0.1 * look, 16 * look)
    (plan.directory / plan.trained[0] / "alerts.jsonl").write_text(json.dumps(ALERT) + "\n", encoding="utf-8")
    if plan.whole:
        spec = RewardSpec(
            rubrics={},
            reading=ReadingSettings(),
            digit_token_ids=(1, 2, 3, 4, 5),
            validation={"alignment": {"srcc": 0.75, "plcc": None}},
            base="demo/vlm",
        )
        plan.reward_model.mkdir(parents=True)
        spec.write(plan.reward_model)


def _fabricate_test(plan: Plan, task: str, row: str, facets: list[str], prompts: int) -> None:
    directory = plan.test_directory(row, task)
    shift, fallen = SHIFTS[task][row], FALLEN.get((task, row))
    (directory / "images").mkdir(parents=True)
    prompts_rng, rng, rows, index = np.random.default_rng(3), np.random.default_rng(len(str(directory))), [], []
    for i in range(prompts):
        number, category = 500 + i, CATEGORIES[task][i % len(CATEGORIES[task])]
        shared = {"id": number, "prompt": f"a {category} in a long description, number {i}", "category": category}
        hard = prompts_rng.uniform(1.5, 3.5)
        for member in range(2):
            noise = rng.normal(scale=0.04)
            value = -0.2 if category == fallen else shift
            scores = {
                facet: round(float(np.clip(hard + (-0.2 if facet == fallen else value) + noise, 1, 5)), 4)
                for facet in facets
            }
            if row in measured_rows(task):  # the short selection names verifiers alike
                agrees = measured_rows(task)[row] == "base"
                for dimension, truth in TRUTHS[task].items():
                    judged = float(np.mean([scores[name] for name in truth]))
                    scores[dimension] = judged if agrees else 6 - judged
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
    seconds = {stage.name: 30.0 + 10 * i for i, stage in enumerate(stages(plan))}
    return build_report(plan, seconds=seconds, commands=commands)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return make(Plan(directory=tmp_path_factory.mktemp("demo"), upper_bound=True))


def test_planted_gains_come_out(report):
    for task, last in (("t2i", 10.0), ("edit", 5.0)):
        overall = report.gains[task]["overall"]
        assert overall.mean == pytest.approx(last, abs=0.8)  # 0.4 on 1..5 is 10 points
        assert overall.n == 60
        assert set(report.gains[task]) == {"overall", *CATEGORIES[task]}


def test_claims_say_what_was_planted(report):
    verdicts = {claim.text: claim.verdict for claim in report.claims}
    assert verdicts == {
        "The text-to-image teacher is better than the guided base.": "holds",
        "The text-to-image teacher is significantly below the guided base in no category.": "fails",
        "The editing teacher does more of what is asked for than the guided base.": "holds",
        "The editing teacher is significantly below the guided base in neither identity nor untouched pixels.": "fails",
        "The student, without guidance, is better at text-to-image than the guided base.": "holds",
        "The student, without guidance, is better at editing than the guided base.": "fails",
        "The student has at least 90% of the gain over the base of the text-to-image teacher it imitated.": "holds",
        "The student has at least 90% of the gain over the base of the editing teacher it imitated.": "fails",
        "The student's images of one prompt have at least 75% of the guided base's variety.": "holds",
        "The student beats Mix-RL, drawn at its guidance, on the mean of both tasks.": "holds",
        "The student beats Mix-RL, drawn without guidance, on the mean of both tasks.": "fails",
        "The text-to-image teacher has at least 60% of the gain over the guided base that verifiers as rewards give.": (
            "fails"
        ),
        "The editing teacher has at least 60% of the gain over the guided base that verifiers as rewards give.": (
            "fails"
        ),
    }
    found = {claim.text: claim.found for claim in report.claims}
    text = "The text-to-image teacher is significantly below the guided base in no category."
    assert found[text].startswith("typography -10.0")  # from 0.2 over the base to 0.2 below it, of 4 points


def test_what_the_monitor_saw_is_told(report, tmp_path):
    assert set(report.monitoring) == {
        "t2i_teacher", "edit_teacher", "mix_rl", "t2i_teacher_verifier", "edit_teacher_verifier"
    }  # fmt: skip
    watch = report.monitoring["t2i_teacher"]
    assert (watch.looks, watch.alerts) == (3, [ALERT["message"]])
    assert (watch.reward_change, watch.monitor_change) == pytest.approx((0.4, -0.2))
    assert watch.gap.y == pytest.approx([0, 0.3, 0.6])
    page, data = write_report(report, tmp_path)
    assert ALERT["message"] in page.read_text(encoding="utf-8")
    told = json.loads(data.read_text())["monitoring"]["t2i_teacher"]
    assert told == {
        "looks": 3, "reward_change": watch.reward_change, "monitor_change": watch.monitor_change,
        "alerts": [ALERT["message"]],
    }  # fmt: skip


def test_overall_is_explained_below_its_table(report, tmp_path):
    page = write_report(report, tmp_path)[0].read_text(encoding="utf-8")
    assert "is the plain mean of instruction following, identity, preservation, quality." in page


def test_arena_orders_the_planted_models(report):
    elo = {name: rating.elo for name, rating in report.arena["t2i"].items()}
    assert min(elo["t2i_teacher"], elo["student"]) > elo["mix_rl"] > elo["base"]
    assert set(report.arena_categories["edit"]) == set(CATEGORIES["edit"])


def test_edit_cards_show_their_source(report):
    edits = [grid for grid in report.grids if grid.category.startswith("edits")]
    assert all(row.source is not None for grid in edits for row in grid.rows)


def test_cards_and_battles_show_each_model_as_it_is_used(report):
    shown = {"base", "base_guided", "edit_teacher", "edit_teacher_verifier", "mix_rl", "student"}
    cards = [row for grid in report.grids if grid.category.startswith("edits") for row in grid.rows]
    assert all(set(row.images) == shown for row in cards)
    assert set(report.arena["edit"]) == shown


def test_json_has_the_promised_schema(report, tmp_path):
    data = json.loads(write_report(report, tmp_path)[1].read_text())
    assert data["models"] == [
        "base", "base_guided", "t2i_teacher", "t2i_teacher_unguided", "edit_teacher", "edit_teacher_unguided",
        "t2i_teacher_verifier", "edit_teacher_verifier", "mix_rl", "mix_rl_unguided", "student",
    ]  # fmt: skip
    pillar = data["bench"]["t2i"]["alignment"]["student"]
    assert set(pillar) == {"mean", "low", "high", "n"}
    assert set(data["bench"]["edit"]) == {"instruction following", "identity", "preservation", "quality", "overall"}
    assert set(data["arena"]["edit"]["mix_rl"]) == {"elo", "low", "high"}
    assert data["seconds"]["mix_rl"] > 0


def test_a_quick_run_says_what_it_cannot_show(tmp_path):
    report = make(Plan(directory=tmp_path, selection="t2i", quick=True))
    assert report.models == ["base", "base_guided", "t2i_teacher_verifier"]
    assert "cannot show" in report.summary[0]
    assert [box.name for box in report.pipeline] == ["base", "t2i_teacher_verifier"]
    assert [claim.verdict for claim in report.claims] == ["holds", "holds"]
    assert report.reward_validation == report.reward_model == {}


def test_what_the_reward_model_reached_is_in_the_report(report) -> None:
    assert report.reward_validation == {"alignment": {"srcc": 0.75}}


def test_the_reward_model_is_compared_with_the_judge_on_base_and_teacher(report) -> None:
    # Planted: the reward model's scores are the judge's on the base, and their opposite on the teacher.
    assert set(report.reward_model) == {"alignment", "aesthetic", "portrait", "instruction_following"}
    for dimension, task in (("alignment", "t2i"), ("instruction_following", "edit")):
        found = report.reward_model[dimension]
        assert set(found) == {"all", *CATEGORIES[task]}
        base, teacher = found["all"]
        assert (base.on, teacher.on) == ("base", "teacher")
        assert (base.srcc, base.pairwise_in_group) == pytest.approx((1.0, 1.0))
        assert (teacher.srcc, teacher.pairwise_in_group) == pytest.approx((-1.0, 0.0))
        assert base.n == teacher.n == 120


def test_the_picture_shows_reward_models_curation_and_weights(report) -> None:
    boxes = {box.name: box for box in report.pipeline}
    assert set(boxes["t2i_teacher"].after) == {"curation", "weights"}
    assert boxes["curation"].after == boxes["weights"].after == ["reward models"]
    assert boxes["student"].after == ["t2i_teacher", "edit_teacher"]
