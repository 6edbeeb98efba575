"""What the tiny vision-language model is pre-trained on: questions about pictures whose content is known.

- describe: list every attribute, so that one picture serves many labels;
- check: what a prompt asks for, what the picture shows, whether they agree;
- compare: every attribute before and after an edit, what it should have changed and what it changed;
- damage: name the damage of a picture or a face, and how strong it is.

No score occurs: that is left to fine-tuning. A batch is a pure function of (seed, step).

Shapes: N pictures, C = 3, H = W = 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from demo.annotation.cases import alter
from demo.annotation.damage import FACE, GRADES, PICTURE, damage
from demo.annotation.judgements import DAMAGE, IDENTITY, judge_alignment, judge_damage, judge_edit, say
from demo.making.vlm_pool import Pool, imitated
from demo.world.captions import caption, parse
from demo.world.edits import make_edit
from demo.world.looks import LOOKS, look_of
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES, LETTERS
from demo.world.world import Scene, keyed_rng, make_scene
from flow_rl.models.images import from_uint8, to_uint8
from flow_rl.rewards.conversation import Question
from flow_rl.rewards.rubrics import Rubric

RUBRICS = Path(__file__).parents[1] / "rubrics"
STRENGTHS = ("slight", "some", "strong", "severe")
_BATCH_STREAM = 31
#: share of the checks that are about a card: letters are learnt last
_CHECKED_CARDS = 0.4


def _instruction(name: str, text: str, *, edit: bool = False) -> Rubric:
    return Rubric(name=name, version=1, task="edit" if edit else "t2i", text=text)


# The first sentence of the rubric that needs the skill, so that fine-tuning begins from it.
DESCRIBE = _instruction("describe", "Describe the image.")
CHECK = _instruction("check", "Is what the prompt asks for in the image?")
COMPARE = _instruction("compare", "Is the edit done and the rest kept?", edit=True)
PICTURE_QUESTION = _instruction("damage", "How sound is the image? Name the damage.")
FACE_QUESTION = _instruction("damage", "How sound is the face? Name the damage.")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question and the assistant's whole turn."""

    question: Question
    answer: str


def description(scene: Scene) -> str:
    """Every attribute of a scene, in the order of the vocabulary, and its look."""
    parts = [f"object {scene.category}"]
    for attribute in ATTRIBUTES[scene.category]:
        value = scene.attributes.get(attribute.name, "none")
        parts.append(f"{say('', attribute.name)} {say(attribute.name, value)}")
    if scene.category in LOOKS:
        parts.append(f"{IDENTITY} {look_of(scene)}")
    return ", ".join(parts)


def describe(pool: Pool, count: int, rng: np.random.Generator) -> list[Example]:
    """Pictures with the list of their attributes."""
    rows = rng.integers(len(pool.scenes), size=count)
    return [
        Example(question=Question(rubric=DESCRIBE, prompt="", image=image), answer=description(pool.scenes[row]))
        for row, image in zip(rows, imitated(pool.images[rows], rng), strict=True)
    ]


def check(pool: Pool, count: int, rng: np.random.Generator) -> list[Example]:
    """Pictures with a prompt that is true of them, half-true, or about something else."""
    cards = rng.random(count) < _CHECKED_CARDS
    rows = np.where(cards, rng.choice(pool.cards, size=count), rng.integers(len(pool.scenes), size=count))
    examples = []
    for row, image in zip(rows, imitated(pool.images[rows], rng), strict=True):
        scene = pool.scenes[row]
        if rng.random() < 0.06:
            asked = pool.scenes[int(rng.integers(len(pool.scenes)))]
        else:
            asked = alter(scene, int(rng.choice((0, 1, 2, 3))), sorted(scene.attributes), pool.split, rng)
        prompt = caption(asked, int(rng.integers(2**31)), int(rng.integers(2**31)))
        answer = judge_alignment(parse(prompt), scene.category, scene.attributes).reasoning
        examples.append(Example(question=Question(rubric=CHECK, prompt=prompt, image=image), answer=answer))
    return examples


def compare(pool: Pool, count: int, rng: np.random.Generator) -> list[Example]:
    """Edits with what was done and what else changed."""
    edits = [pool.edits[i] for i in rng.integers(len(pool.edits), size=count)]
    results = from_uint8(np.stack([edit.result for edit in edits]))
    for row, edit in enumerate(edits):
        if DAMAGE in edit.broken:
            results[row], _ = damage(results[row], PICTURE, int(rng.integers(2, GRADES + 1)), rng)
    sources = torch.from_numpy(np.stack([edit.source for edit in edits])).permute(0, 3, 1, 2)
    images = torch.from_numpy(to_uint8(results)).permute(0, 3, 1, 2)
    examples = []
    for edit, source, image in zip(edits, sources, images, strict=True):
        pair = edit.pair
        told = judge_edit(
            pair.attribute,
            pair.value,
            pair.source.attributes,
            edit.attributes,
            category=pair.category,
            looks=(look_of(pair.source), edit.look),
            broken=edit.broken,
        )
        question = Question(rubric=COMPARE, prompt=pair.instruction, image=image, source=source)
        examples.append(Example(question=question, answer=told.reasoning))
    return examples


def name_damage(pool: Pool, count: int, rng: np.random.Generator) -> list[Example]:
    """Damaged pictures, and as many damaged faces, with the kinds of damage and their strength."""
    examples = []
    for index in range(count):
        face = index % 2 == 1
        row = int(rng.choice(pool.portraits)) if face else int(rng.integers(len(pool.scenes)))
        grade = int(rng.integers(GRADES + 1))
        image, kinds = damage(from_uint8(pool.images[[row]])[0], FACE if face else PICTURE, grade, rng)
        answer = judge_damage(kinds, grade).reasoning + (f", {STRENGTHS[grade - 1]}" if grade else "")
        pixels = torch.from_numpy(to_uint8(image[None])[0]).permute(2, 0, 1).contiguous()
        rubric = FACE_QUESTION if face else PICTURE_QUESTION
        # The prompt is of no use here, and must be seen to be.
        prompt = caption(pool.scenes[row], 0, int(rng.integers(2**31)))
        examples.append(Example(question=Question(rubric=rubric, prompt=prompt, image=pixels), answer=answer))
    return examples


Task = Callable[[Pool, int, np.random.Generator], list[Example]]
#: each task with its examples a step
TASKS: dict[str, tuple[Task, int]] = {
    "describe": (describe, 8),
    "check": (check, 28),
    "compare": (compare, 12),
    "damage": (name_damage, 28),
}


def task_batch(name: str, pool: Pool, seed: int, step: int, *, count: int | None = None) -> list[Example]:
    """One task's examples of a step; by default as many as `TASKS` says."""
    make, usual = TASKS[name]
    return make(pool, usual if count is None else count, keyed_rng(seed, step, _BATCH_STREAM, list(TASKS).index(name)))


def corpus(seed: int, count: int) -> list[str]:
    """Everything that the model reads and writes: the tokenizer's training text."""
    texts = ["system user assistant", "Prompt: Image: Instruction: Source image: Edited image: Score: "]
    texts += [" ".join(LETTERS), " ".join("0123456789"), " ".join(STRENGTHS), " ".join((*PICTURE, *FACE, "mixed"))]
    texts += [Rubric.load(path).system_text for path in sorted(RUBRICS.glob("*.yaml"))]
    texts += [r.system_text for r in (DESCRIBE, CHECK, COMPARE, PICTURE_QUESTION, FACE_QUESTION)]
    texts += [" ".join((c, *(say("", a.name) for a in ATTRIBUTES[c]))) for c in CATEGORIES]
    texts += [" ".join(v for a in ATTRIBUTES[c] for v in a.values) for c in CATEGORIES]
    texts.append("yes, no, missing, done, half, undone, changed nothing, identity and damage: none")
    for index in range(count):
        scene = make_scene(seed, index, split="train")
        texts += [caption(scene, seed, index), make_edit(seed, index, split="train").instruction]
    return [piece for text in texts for piece in (text, *_apart(text))]


def _apart(text: str) -> list[str]:
    """The text's words without the punctuation that the tokenizer sets apart anyway."""
    return ["".join(c if c.isalnum() else " " for c in text)]
