"""Images sampled from a model of the demo, with the trained annotator's verdicts.

A reward model has to be right where it is used: on what the policy draws. So categories take turns, and half of the
images are guided, as the rollouts of RL are. The annotator reads attributes given a category, so an image is taken to
show the category that its prompt asks for; and of identity it has the colour alone that tells one person or plant from
another (`demo.world.looks`).

Shapes: P prompts, G members a prompt, C = 3, H = W = 32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.annotation.groups import Group, damaged_group, edit_group, render_tensor
from demo.annotation.judgements import DAMAGE, IDENTITY, judge_alignment
from demo.scorers.sets import load_quality, load_verifier
from demo.world.cache import cached_arrays
from demo.world.captions import caption, parse
from demo.world.edits import EditPair, make_edit
from demo.world.looks import look_of, read_look
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES
from demo.world.world import SPLITS, Split, keyed_rng, make_scene
from flow_rl.batches import Prompts
from flow_rl.flow.guidance import Guidance
from flow_rl.models import ImageModel, load_image_model
from flow_rl.models.images import from_uint8, to_uint8
from flow_rl.rl.sampling import Sampler

#: steps of the demo's rollouts
STEPS = 5
#: prompts take turns with these, category by category
GUIDANCES = (Guidance(scale=1.0), Guidance(scale=2.5))
#: an edit whose result has less quality than this is damaged
_SOUND = 3.0
_STREAM = 29


def sample(
    model: Path,
    prompts: Prompts,
    *,
    guidance: Guidance,
    members: int,
    seed: int,
    cache_dir: Path | None,
    batch_size: int = 64,
) -> Tensor:
    """Sample a model, or read what it made of the same prompts before.

    Args:
        model: directory in the diffusers layout.
        prompts: P of them, with sources for edits.
        guidance: of every image.
        members: G.
        seed: of the noise.
        cache_dir: keeps the images; None keeps nothing.
        batch_size: images drawn at a time.

    Returns:
        images in [0, 1] with the 256 levels of a file, shape (P, G, 3, H, W).
    """
    path = None
    if cache_dir is not None:
        weights = hashlib.blake2b(digest_size=12)
        for file in sorted(model.rglob("*.safetensors")):
            weights.update(file.read_bytes())
        sources = b"" if prompts.sources is None else prompts.sources.numpy().tobytes()
        weights.update(repr((prompts.ids, prompts.texts, members, seed, STEPS, guidance)).encode() + sources)
        path = cache_dir / f"policy-samples-{weights.hexdigest()}.npz"

    def draw() -> dict[str, np.ndarray]:
        loaded = _load(model)
        sampler = Sampler(
            sigmas=loaded.sigmas(STEPS), guidance=guidance, size=(32, 32), seed=seed, batch_size=batch_size
        )
        return {"images": to_uint8(sampler.images(loaded, prompts, members=members))}

    return from_uint8(cached_arrays(path, draw)["images"]).unflatten(0, (len(prompts), members))


@cache
def _load(model: Path) -> ImageModel:
    return load_image_model(model, image_size=(32, 32))


def sample_in_turn(
    model: Path, prompts: Prompts, *, guidances: Sequence[Guidance], members: int, seed: int, cache_dir: Path | None
) -> Tensor:
    """As `sample`, with guidances that take turns with each round of the categories; (P, G, 3, H, W)."""
    turns = [index // len(CATEGORIES) % len(guidances) for index in range(len(prompts))]
    images = torch.empty(len(prompts), members, 3, 32, 32)
    for turn, guidance in enumerate(guidances):
        rows = [row for row, its in enumerate(turns) if its == turn]
        if rows:
            images[rows] = sample(
                model, prompts.select(rows), guidance=guidance, members=members, seed=seed, cache_dir=cache_dir
            )
    return images


def sampled_groups(
    model: Path, seed: int, counts: Mapping[str, int], *, split: Split, members: int, cache_dir: Path | None
) -> Iterator[Group]:
    """Groups of sampled images.

    Prompted images are judged for alignment; some groups, portraits first of all, also for faces or aesthetics, after
    half of their images were damaged further.

    Args:
        model: the image model.
        seed: of prompts and noise.
        counts: groups by dimension; a prompt's images serve alignment and one other dimension at most.
        split: of all scenes.
        members: G.
        cache_dir: keeps the samples.
    """
    first_id = (1 + SPLITS.index(split)) * 10**6
    yield from _prompted(model, seed, counts, split, members, cache_dir, first_id)
    edits = counts["instruction_following"]
    yield from _edited(model, seed, edits, split, members, cache_dir, first_id + counts["alignment"])


def _prompted(
    model: Path,
    seed: int,
    counts: Mapping[str, int],
    split: Split,
    members: int,
    cache_dir: Path | None,
    first_id: int,
) -> Iterator[Group]:
    annotator, quality = load_verifier("annotator"), load_quality("annotator")
    count, left = counts["alignment"], {name: counts[name] for name in ("aesthetic", "portrait")}
    scenes = [
        make_scene(seed, _key(index, 0), split=split, category=CATEGORIES[index % len(CATEGORIES)])
        for index in range(count)
    ]
    texts = tuple(caption(scene, seed, _key(index, 1)) for index, scene in enumerate(scenes))
    prompts = Prompts(
        ids=tuple(range(first_id, first_id + count)), texts=texts, categories=tuple(s.category for s in scenes)
    )
    samples = sample_in_turn(model, prompts, guidances=GUIDANCES, members=members, seed=seed, cache_dir=cache_dir)
    for index, (text, scene, images) in enumerate(zip(texts, scenes, samples, strict=True)):
        request, verdict = parse(text), annotator.check(images, [text] * members)
        yield Group(
            name=f"alignment-{index}",
            dimension="alignment",
            prompt=text,
            images=images,
            judgements=tuple(
                judge_alignment(request, scene.category, shown, certainty=certainty)
                for shown, certainty in zip(verdict.predicted, verdict.probabilities, strict=True)
            ),
        )
        dimension = "portrait" if scene.category == "portrait" and left["portrait"] else "aesthetic"
        if left[dimension]:
            left[dimension] -= 1
            grades = (5 - quality(images)).clamp(0, 4).tolist()
            rng = keyed_rng(seed, index, _STREAM)
            yield damaged_group(dimension, f"{dimension}-{index}", text, images, grades, rng, keep=0.5)


def _edited(
    model: Path, seed: int, count: int, split: Split, members: int, cache_dir: Path | None, first_id: int
) -> Iterator[Group]:
    if not count:
        return
    annotator, quality = load_verifier("annotator"), load_quality("annotator")
    pairs: list[EditPair] = [make_edit(seed, _key(index, 2), split=split) for index in range(count)]
    prompts = Prompts(
        ids=tuple(range(first_id, first_id + count)),
        texts=tuple(pair.instruction for pair in pairs),
        categories=tuple(pair.category for pair in pairs),
        sources=torch.cat([render_tensor(pair.source) for pair in pairs]),
    )
    samples = sample_in_turn(model, prompts, guidances=GUIDANCES, members=members, seed=seed, cache_dir=cache_dir)
    for index, (pair, images) in enumerate(zip(pairs, samples, strict=True)):
        categories = [pair.category] * members
        shown = annotator.predict(images, categories)
        certainties = annotator.probabilities(images, categories, [_wanted(pair)] * members)
        sound = quality(images) >= _SOUND
        looks = [read_look(image, pair.category) for image in images]
        flaws = [
            (IDENTITY,) * (look != look_of(pair.source)) + (DAMAGE,) * (not whole)
            for look, whole in zip(looks, sound.tolist(), strict=True)
        ]
        yield edit_group(
            index, pair, images, shown, looks, flaws, source=prompts.sources[index], certainties=certainties
        )


def _wanted(pair: EditPair) -> dict[str, str]:
    """What an edit's result should show: the value asked for, and the source's attributes, as far as they exist."""
    target = pair.target.attributes
    return {a.name: target.get(a.name, "none") for a in ATTRIBUTES[pair.category]}


def _key(index: int, stream: int) -> int:
    """Scenes that no group of renders is made from."""
    return 2**41 + 4 * index + stream
