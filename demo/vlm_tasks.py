"""What the tiny vision-language model is pre-trained on: questions about pictures whose content is known.

- describe: list every attribute, so that one picture serves many labels;
- check: what a prompt asks for, what the picture shows, whether they agree;
- compare: every attribute before and after an edit, what it should have changed and what it changed;
- damage: name the damage of a picture or a face, and how strong it is.

No score occurs: that is left to fine-tuning. A batch is a pure function of (seed, step).

Shapes: N pictures, C = 3, H = W = 32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.cache import cached_arrays
from demo.captions import caption, parse
from demo.cases import alter, edit_case
from demo.damage import FACE, GRADES, PICTURE, damage
from demo.dataset import render_scenes
from demo.degrade import imitate_generator
from demo.edits import EditPair, make_edit
from demo.font import GLYPH_HEIGHT, GLYPH_WIDTH, place_letters
from demo.judgements import DAMAGE, IDENTITY, judge_alignment, judge_damage, judge_edit, say
from demo.looks import LOOKS, look_of
from demo.render import SIZE, print_card
from demo.vocabulary import ATTRIBUTES, CATEGORIES, LETTERS
from demo.world import WORLD_VERSION, Scene, Split, keyed_rng, make_scene, render
from models.images import from_uint8, to_uint8
from rewards.conversation import Question
from rewards.rubrics import Rubric

RUBRICS = Path(__file__).parent / "rubrics"
STRENGTHS = ("slight", "some", "strong", "severe")
_BATCH_STREAM = 31
#: a third as many cards again: there are 26 letters to learn, and only a fifth of the scenes shows any
_CARDS = 3
#: share of the checks that are about a card: letters are learnt last
_CHECKED_CARDS = 0.4
_LOOSE_STREAM = 43


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


@dataclass(frozen=True, kw_only=True)
class EditExample:
    """A rendered edit: source and result uint8 (32, 32, 3), the pair, and the result's attributes, look and flaws."""

    pair: EditPair
    source: np.ndarray
    result: np.ndarray
    attributes: dict[str, str]
    look: str
    broken: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Renders that batches are drawn from.

    Attributes:
        split: of all scenes.
        scenes: N of them.
        images: uint8 (N, 32, 32, 3).
        portraits: rows of `scenes` that are portraits.
        cards: rows of `scenes` that are cards.
        edits: rendered edits.
    """

    split: Split
    scenes: list[Scene]
    images: np.ndarray
    portraits: np.ndarray
    cards: np.ndarray
    edits: list[EditExample]


def load_pool(
    seed: int,
    scenes: int,
    edits: int,
    *,
    split: Split,
    cache_dir: Path | None,
    workers: int = 0,
    loose_cards: bool = False,
) -> Pool:
    """Render a pool, or read it.

    Args:
        seed: which stream of scenes.
        scenes: scenes of any category; a third as many cards are added.
        edits: edits, with three results each.
        split: of everything.
        cache_dir: keeps the pixels.
        workers: processes that render scenes; 0 renders here.
        loose_cards: half of the added cards have letters of other sizes in other places. A split's texts are its own,
            so that some letters never stand alone in it: this is how they are seen large all the same.
    """
    pixels, made = [], []
    for count, category in ((scenes, None), (scenes // _CARDS, "typography")):
        common = {"split": split, "category": category}
        data = render_scenes(seed, range(count), **common, workers=workers if count > 500 else 0, cache_dir=cache_dir)
        pixels.append(data.images)
        made += [make_scene(seed, index, **common) for index in range(count)]
    images, categories = np.concatenate(pixels), np.array([scene.category for scene in made])
    if loose_cards:
        for row in range(scenes, len(made), 2):
            images[row] = loose_card(made[row], keyed_rng(seed, row, _LOOSE_STREAM))
    return Pool(
        split=split,
        scenes=made,
        images=images,
        portraits=np.flatnonzero(categories == "portrait"),
        cards=np.flatnonzero(categories == "typography"),
        edits=_edit_pool(seed, edits, split, cache_dir),
    )


def _edit_pool(seed: int, count: int, split: Split, cache_dir: Path | None) -> list[EditExample]:
    cases = [edit_case(seed, index, split=split, members=3) for index in range(count)]
    key = hashlib.blake2b(repr((WORLD_VERSION, seed, count, split)).encode(), digest_size=12).hexdigest()
    path = None if cache_dir is None else cache_dir / f"edit-outcomes-{key}.npz"

    def draw() -> dict[str, np.ndarray]:
        rendered = [np.stack([render(s) for s in (pair.source, *(o.scene for o in made))]) for pair, made in cases]
        return {"images": np.stack(rendered)}

    pixels = cached_arrays(path, draw)["images"]
    return [
        EditExample(
            pair=pair,
            source=row[0],
            result=row[1 + i],
            attributes=made.scene.attributes,
            look=look_of(made.scene),
            broken=made.broken,
        )
        for (pair, outcomes), row in zip(cases, pixels, strict=True)
        for i, made in enumerate(outcomes)
    ]


def loose_card(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A card whose one or two letters are of drawn sizes in drawn places, uint8 (H, W, 3); longer texts as usual."""
    text = scene.options["text"]
    if len(text) > 2:
        return render(scene)
    scales = rng.permutation((2, 3))[: len(text)]
    free = SIZE - int(scales.sum()) * GLYPH_WIDTH - (len(text) - 1)  # one column between two letters
    boxes, left = [], 0
    for scale in scales.tolist():
        gap = int(rng.integers(free + 1))
        free, left = free - gap, left + gap
        boxes.append((int(rng.integers(SIZE - scale * GLYPH_HEIGHT + 1)), left, scale))
        left += scale * GLYPH_WIDTH + 1
    return print_card(place_letters(text, boxes, SIZE), scene.options)


def description(scene: Scene) -> str:
    """Every attribute of a scene, in the order of the vocabulary, and its look."""
    parts = [f"object {scene.category}"]
    for attribute in ATTRIBUTES[scene.category]:
        value = scene.attributes.get(attribute.name, "none")
        parts.append(f"{say('', attribute.name)} {say(attribute.name, value)}")
    if scene.category in LOOKS:
        parts.append(f"{IDENTITY} {look_of(scene)}")
    return ", ".join(parts)


def imitated(pixels: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Pictures as a generator might have made them: uint8 (N, H, W, 3) to uint8 (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    images = imitate_generator(from_uint8(pixels), generator)
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).contiguous()


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
