from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.annotation_files import read_annotations
from datamodules.preferences import read_preferences
from demo.annotation import hard_cases, policy_samples
from demo.annotation.annotations import DIMENSIONS, render_group, write_groups
from demo.annotation.cases import OUTCOMES, alignment_case, alter, edit_case, edit_outcome
from demo.annotation.damage import FACE, PICTURE, damage
from demo.annotation.judgements import judge_alignment, judge_damage, judge_edit
from demo.scorers.sets import load_verifier
from demo.world.captions import caption, parse
from demo.world.degrade import CORRUPTIONS
from demo.world.edits import make_edit
from demo.world.looks import look_of
from demo.world.vocabulary import ATTRIBUTES
from demo.world.world import make_scene, render, split_of
from flow_rl.batches import Prompts
from flow_rl.flow.guidance import Guidance
from flow_rl.models.images import from_uint8
from flow_rl.rewards.base import Samples
from flow_rl.rewards.rubrics import Rubric

RUBRICS = Path(policy_samples.__file__).parents[1] / "rubrics"


@pytest.mark.parametrize(
    ("prompt", "category", "attributes", "score", "wrong"),
    [
        ("a person with red hair", "portrait", {"hair_color": "red"}, 5, []),
        ("a person with red hair", "portrait", {"hair_color": "blue"}, 1, ["hair color"]),
        ("a person with long hair", "portrait", {"hair": "bald"}, 1, ["hair"]),
        ("a person with long red hair", "portrait", {"hair": "long", "hair_color": "blue"}, 3, ["hair color"]),
        ("a person with long red hair", "plant", {"kind": "palm"}, 1, ["object"]),
        ("a potted tulip in a red pot", "plant", {"kind": "palm", "pot": "red"}, 3, ["kind"]),
        ("a potted tulip in a red pot", "plant", {"kind": "palm", "pot": "blue"}, 1, ["kind", "pot"]),
        ("a pink card that says K T", "typography", {"card": "pink", "text": "KT"}, 5, []),
        ("a pink card that says K T", "typography", {"card": "pink", "text": "KP"}, 4, ["text"]),
        ("a pink card that says K T", "typography", {"card": "pink", "text": "TK"}, 3, ["text"]),
    ],
)
def test_alignment_is_the_share_of_the_requirements_that_are_met(
    prompt: str, category: str, attributes: dict[str, str], score: float, wrong: list[str]
) -> None:
    judged = judge_alignment(parse(prompt), category, attributes)
    assert judged.score == score
    failed = [part for part in judged.reasoning.split(", ") if part.endswith((" no", " missing"))]
    # "hair color red: ..." is about the colour, not the hair.
    names = [max((n for n in wrong if part.startswith(f"{n} ")), key=len) for part in failed]
    assert list(dict.fromkeys(names)) == wrong  # a text fails by letters
    cap = Rubric.load(RUBRICS / "alignment.yaml")
    assert (cap.cap_phrase in judged.reasoning) == ("object" in wrong)
    assert score <= cap.cap_score or "object" not in wrong


def test_uncertain_attributes_count_by_their_certainty() -> None:
    request = parse("a person with long red hair")
    shown = {"hair": "long", "hair_color": "red"}
    judged = judge_alignment(request, "portrait", shown, certainty={"hair": 0.75, "hair_color": 0.5})
    assert judged.score == 1 + 4 * 0.625
    known = judge_alignment(request, "portrait", shown, certainty={"hair": 1.0, "hair_color": 1.0})
    assert known == judge_alignment(request, "portrait", shown)
    assert judged.reasoning == known.reasoning


@pytest.mark.parametrize(
    ("asked", "shown", "reasoning", "score"),
    [
        ("K T", "KT", "text K: K yes, text T: T yes", 5),
        ("K T", "KP", "text K: K yes, text T: P no", 3),
        ("K T", "K", "text K: K yes, text T: none no", 3),
        ("K", "KT", "text K: K yes, text none: T no", 3),
    ],
)
def test_a_text_is_compared_letter_by_letter(asked: str, shown: str, reasoning: str, score: float) -> None:
    judged = judge_alignment(parse(f"a card that says {asked}"), "typography", {"text": shown})
    assert judged.reasoning == f"object typography: typography yes, {reasoning}"
    assert judged.score == score


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_was_replaced_in_a_caption_is_what_fails(split: str) -> None:
    """A caption of a scene against the scene it was altered from: the failing requirements are known beforehand."""
    failures = Counter()
    for index in range(60):
        shown = make_scene(1, index, split=split)
        rng = np.random.default_rng(index)
        asked = alter(shown, index % 4, sorted(shown.attributes), split, rng)
        prompt = caption(asked, 2, index)
        named = parse(prompt).attributes
        replaced = {n for n in named if asked.attributes[n] != shown.attributes.get(n, "none")}
        # Independent of the rule's code: each requirement counts the same, and a text by its letters.
        met = [float(name not in replaced) for name in named if name != "text"]
        if "text" in named:
            here = shown.attributes["text"]
            met.append(
                sum(a == b for a, b in zip(named["text"], here, strict=False)) / max(len(named["text"]), len(here))
            )
        expected = pytest.approx(1 + 4 * np.mean(met), abs=0.005)
        judged = judge_alignment(parse(prompt), shown.category, shown.attributes)
        assert judged.score == expected, (prompt, judged)
        letters = list(zip_longest(named.get("text", ""), shown.attributes.get("text", "") if "text" in named else ""))
        failed = [part for part in judged.reasoning.split(", ") if part.endswith(" no")]
        assert len(failed) == len(replaced - {"text"}) + sum(asked != there for asked, there in letters)
        assert split_of(asked.category, asked.attributes) == split
        failures[len(replaced)] += 1
    assert len(failures) >= 4


def test_every_scene_of_a_case_belongs_to_its_split() -> None:
    for split in ("train", "validation", "test"):
        for index in range(12):
            case = alignment_case(3, index, split=split, members=4)
            assert {split_of(s.category, s.attributes) for s in case.scenes} == {split}
            pair, outcomes = edit_case(3, index, split=split, members=4)
            scenes = [pair.source, *(outcome.scene for outcome in outcomes)]
            assert {split_of(s.category, s.attributes) for s in scenes} == {split}


def test_outcomes_of_an_edit_are_judged_as_what_they_are() -> None:
    scores: dict[str, set[int]] = {name: set() for name in OUTCOMES}
    for index in range(25):
        pair = make_edit(4, index, split="train")
        for name in dict.fromkeys(OUTCOMES):
            made = edit_outcome(pair, name, "train", np.random.default_rng(index))
            if made is None:
                continue
            told = judge_edit(
                pair.attribute,
                pair.value,
                pair.source.attributes,
                made.scene.attributes,
                category=pair.category,
                looks=(look_of(pair.source), look_of(made.scene)),
                broken=made.broken,
            )
            scores[name].add(told.score)
            core, *rest, _ = told.reasoning.split(", ")
            wanted = {"half": "half", "half_more": "half", "undone": "undone", "wrong": "undone"}.get(name, "done")
            before, shown, asked = (
                value.replace("_", " ")
                for value in (
                    pair.source.attributes.get(pair.attribute, "none"),
                    made.scene.attributes.get(pair.attribute, "none"),
                    pair.value,
                )
            )
            assert core == f"{pair.attribute.replace('_', ' ')} {asked}: {shown} {before} {wanted}"
            assert len(rest) == len(ATTRIBUTES[pair.category])  # the others, and who it is
            for line in rest:
                assert line.endswith("kept") == (line.split(": ")[1].split()[0] == line.split()[-2])
            assert told.reasoning.endswith("changed nothing") == (name in ("right", "half", "undone"))
    expected = {"right": 5, "more": 4, "damaged": 4, "identity": 3, "half": 3, "half_more": 2, "undone": 1, "wrong": 1}
    assert scores == {name: {score} for name, score in expected.items()}
    pair = make_edit(4, 0, split="train")
    with pytest.raises(ValueError, match="Unknown outcome 'rihgt'"):
        edit_outcome(pair, "rihgt", "train", np.random.default_rng(0))


def test_an_uncertain_edit_lies_between_its_readings() -> None:
    before, done = {"hair": "long", "hair_color": "red"}, {"hair": "long", "hair_color": "blue"}
    asked = ("hair_color", "blue", before)
    common = {"category": "portrait", "looks": ("light", "light")}
    others = dict.fromkeys((a.name for a in ATTRIBUTES["portrait"]), 1.0)

    def score(after: dict[str, str], **certainty: float) -> float:
        return judge_edit(*asked, after, certainty=others | certainty, **common).score

    assert score(done, hair_color=1.0) == judge_edit(*asked, done, **common).score == 5
    assert score(done, hair_color=0.75) == 0.75 * 5 + 0.25 * 1  # done, else undone as far as one can tell
    assert score(done | {"hair_color": "green"}, hair_color=0.25) == 0.25 * 5 + 0.75 * 3  # half done: it did change
    assert score(done, hair_color=1.0, hair=0.5) == 4.5


def test_another_identity_changes_pixels_but_no_attribute() -> None:
    pair = make_edit(5, 0, split="train")
    made = edit_outcome(pair, "identity", "train", np.random.default_rng(0))
    assert made.scene.attributes == pair.target.attributes
    assert (render(made.scene) != render(pair.target)).mean() > 0.02


@pytest.mark.parametrize("kind", [*PICTURE, *FACE])
def test_more_damage_is_further_from_the_picture(kind: str) -> None:
    scenes = [make_scene(6, i, split="train", category="portrait") for i in range(6)]
    images = from_uint8(np.stack([render(scene) for scene in scenes]))
    kinds = {kind: (PICTURE | FACE)[kind]}
    distances = []
    for grade in range(5):
        made = (
            [kinds[kind](x, grade, torch.Generator().manual_seed(i)) for i, x in enumerate(images)] if grade else images
        )
        distances.append(sum((a - b).abs().mean().item() for a, b in zip(made, images, strict=True)))
    assert distances[0] == 0
    assert all(far > near for near, far in pairwise(distances)), distances


def test_damage_is_named_and_graded() -> None:
    image = from_uint8(render(make_scene(7, 0, split="train", category="portrait"))[None])[0]
    same, kinds = damage(image, PICTURE, 0, np.random.default_rng(0))
    assert torch.equal(same, image)
    assert kinds == []
    counts = Counter(len(damage(image, FACE, 4, np.random.default_rng(i))[1]) for i in range(40))
    assert set(counts) == {1, 2}
    assert judge_damage(["blur", "noise"], 3).score == 2
    assert judge_damage([], 0).reasoning == "damage: none"
    with pytest.raises(ValueError, match="grade is 5"):
        damage(image, PICTURE, 5, np.random.default_rng(0))
    assert len(PICTURE) == len(CORRUPTIONS)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_groups_are_a_function_of_their_arguments(dimension: str) -> None:
    first, again, other = (render_group(dimension, 8, i, split="train") for i in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert first.judgements == again.judgements
    assert first.prompt == again.prompt
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (4, 3, 32, 32)
    assert (first.source is not None) == (dimension == "instruction_following")
    with pytest.raises(ValueError, match="Unknown dimension 'beauty'"):
        render_group("beauty", 0, 0, split="train")


def test_the_files_are_what_reward_training_reads(tmp_path: Path) -> None:
    for split in ("train", "test"):
        made = (render_group(d, 9, i, split=split) for d in DIMENSIONS for i in range(3))
        assert write_groups(made, tmp_path, split) == 48
    annotations = {split: read_annotations(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    everything = [a for part in annotations.values() for a in part]
    assert len({a.id for a in everything}) == len(everything) == 96
    assert {a.dimension for a in everything} == set(DIMENSIONS)
    assert all(1 <= a.score <= 5 for a in everything)
    assert {a.score for a in everything} >= {1, 2, 3, 4, 5}
    for a in everything:
        with Image.open(a.image) as picture:
            assert picture.size == (32, 32)
        assert (a.source is not None) == (a.dimension == "instruction_following")
        rubric = Rubric.load(RUBRICS / f"{a.dimension}.yaml")
        assert rubric.task == ("edit" if a.source else "t2i")
        if rubric.cap_phrase and rubric.cap_phrase in a.reasoning:
            assert a.score <= rubric.cap_score
    assert len({(a.group, a.prompt) for a in everything}) == len({a.group for a in everything}) == 24
    score = {a.image: a.score for a in everything}
    pairs = read_preferences(tmp_path / "train_preferences.jsonl")
    assert len(pairs) > 20
    assert all(score[p.chosen.image] > score[p.rejected.image] for p in pairs)
    first = json.loads((tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(first) == {"id", "image", "prompt", "dimension", "score", "reasoning", "group"}


def test_policy_samples_carry_the_annotators_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_samples, "STEPS", 2)
    base = RUBRICS.parent / "base"
    arguments = {"split": "train", "members": 2, "cache_dir": tmp_path}
    counts = {"alignment": 6, "aesthetic": 2, "portrait": 1, "instruction_following": 2}
    groups = list(policy_samples.sampled_groups(base, 10, counts, **arguments))
    assert Counter(g.dimension for g in groups) == counts
    assert len(list(tmp_path.glob("policy-samples-*.npz"))) == 3  # prompts at either guidance, edits at one
    monkeypatch.setattr(policy_samples, "_load", None)  # the second time nothing is sampled
    again = list(policy_samples.sampled_groups(base, 10, counts, **arguments))
    assert all(
        torch.equal(a.images, b.images) and a.judgements == b.judgements for a, b in zip(groups, again, strict=True)
    )
    for group in groups:
        if group.dimension == "alignment":
            verdict = load_verifier("annotator").check(group.images, [group.prompt] * 2)
            expected = 1 + 4 * verdict.probability
            assert [j.score for j in group.judgements] == pytest.approx(expected.tolist(), abs=0.006)


def test_prompts_take_turns_with_guidances(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(model: Path, prompts: Prompts, *, guidance: Guidance, members: int, **_: object) -> torch.Tensor:
        return torch.full((len(prompts), members, 3, 32, 32), guidance.scale)

    monkeypatch.setattr(policy_samples, "sample", drawn)
    prompts = Prompts(ids=tuple(range(12)), texts=("a",) * 12, categories=("c",) * 12)
    guidances = policy_samples.GUIDANCES
    images = policy_samples.sample_in_turn(RUBRICS, prompts, guidances=guidances, members=2, seed=0, cache_dir=None)
    first, second = (g.scale for g in guidances)
    assert images[:, 0, 0, 0, 0].tolist() == [first] * 5 + [second] * 5 + [first] * 2


def test_what_is_read_worst_is_annotated_next(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [render_group(d, 11, i, split="train") for d in ("alignment", "aesthetic") for i in range(4)]
    # Off by 0, 0.5, 1, 1.5 in turn, on the scale; the last alignment group cannot be read at all, which is worst.
    off = {id(g): i % 4 / 2 for i, g in enumerate(groups)} | {id(groups[3]): float("nan")}
    known = {
        image.numpy().tobytes(): judged.score + (off[id(group)] if judged.score <= 3 else -off[id(group)])
        for group in groups
        for image, judged in zip(group.images, group.judgements, strict=True)
    }

    class Planted:
        def __init__(self, export: str, dimension: str) -> None:
            self.dimension = dimension

        def score(self, samples: Samples) -> torch.Tensor:
            assert samples.categories[0] == self.dimension
            return torch.tensor([known[image.numpy().tobytes()] for image in samples.images])

    monkeypatch.setattr(hard_cases, "VLMReward", Planted)
    kept = list(hard_cases.hardest(iter(groups), "export", {"alignment": 2, "aesthetic": 1}))
    assert [g.name for g in kept] == ["alignment-2", "alignment-3", "aesthetic-3"]
