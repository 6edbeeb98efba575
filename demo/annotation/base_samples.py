"""Images sampled from the demo's base, with the trained annotator's verdicts.

The annotator reads attributes given a category, so an image is taken to show the category that its prompt asks for;
and of identity it has the colour alone that tells one person or plant from another (`demo.world.looks`).

Shapes: P prompts, G members a prompt, C = 3, H = W = 32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.annotation.groups import Group, damaged_group, edit_group, render_tensor
from demo.annotation.judgements import DAMAGE, IDENTITY, judge_alignment
from demo.scorers.quality import QualityScore
from demo.scorers.verifiers import Verifier
from demo.world.cache import cached_arrays
from demo.world.captions import caption, parse
from demo.world.edits import EditPair, make_edit
from demo.world.looks import look_of, read_look
from demo.world.world import SPLITS, Split, keyed_rng, make_scene
from flow_rl.batches import Prompts
from flow_rl.flow.guidance import Guidance
from flow_rl.models import ImageModel, load_image_model
from flow_rl.models.images import from_uint8, to_uint8
from flow_rl.rl.sampling import Sampler

#: how the base is sampled: as the demo's training rolls out
STEPS, GUIDANCE = 5, Guidance(scale=1.0)
#: an edit whose result has less quality than this is damaged
_SOUND = 3.0
_STREAM = 29


def sample(
    base: Path, prompts: Prompts, *, members: int, seed: int, cache_dir: Path | None, batch_size: int = 64
) -> Tensor:
    """Sample the base, or read what it made of the same prompts before.

    Args:
        base: directory in the diffusers layout.
        prompts: P of them, with sources for edits.
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
        for file in sorted(base.rglob("*.safetensors")):
            weights.update(file.read_bytes())
        sources = b"" if prompts.sources is None else prompts.sources.numpy().tobytes()
        weights.update(repr((prompts.ids, prompts.texts, members, seed, STEPS, GUIDANCE)).encode() + sources)
        path = cache_dir / f"base-samples-{weights.hexdigest()}.npz"

    def draw() -> dict[str, np.ndarray]:
        model = _load(base)
        sampler = Sampler(
            sigmas=model.sigmas(STEPS), guidance=GUIDANCE, size=(32, 32), seed=seed, batch_size=batch_size
        )
        return {"images": to_uint8(sampler.images(model, prompts, members=members))}

    return from_uint8(cached_arrays(path, draw)["images"]).unflatten(0, (len(prompts), members))


@cache
def _load(base: Path) -> ImageModel:
    return load_image_model(base, image_size=(32, 32))


def base_groups(
    base: Path, seed: int, count: int, *, split: Split, members: int, cache_dir: Path | None
) -> Iterator[Group]:
    """Groups of base samples, for P prompts and P instructions.

    Prompted images are judged for alignment and, some of them damaged further, for aesthetics; portraits for their
    faces.

    Args:
        base: the image model.
        seed: of prompts and noise.
        count: P.
        split: of all scenes.
        members: G.
        cache_dir: keeps the samples.
    """
    first_id = (1 + SPLITS.index(split)) * 10**6
    yield from _prompted(base, seed, count, split, members, cache_dir, first_id)
    yield from _edited(base, seed, count, split, members, cache_dir, first_id + count)


def _prompted(
    base: Path, seed: int, count: int, split: Split, members: int, cache_dir: Path | None, first_id: int
) -> Iterator[Group]:
    annotator, quality = Verifier.load("annotator"), QualityScore.load("annotator")
    # Every other prompt is a portrait, or that rubric would see next to none.
    scenes = [
        make_scene(seed, _key(index, 0), split=split, category="portrait" if index % 2 else None)
        for index in range(count)
    ]
    texts = tuple(caption(scene, seed, _key(index, 1)) for index, scene in enumerate(scenes))
    prompts = Prompts(
        ids=tuple(range(first_id, first_id + count)), texts=texts, categories=tuple(s.category for s in scenes)
    )
    samples = sample(base, prompts, members=members, seed=seed, cache_dir=cache_dir)
    for index, (text, scene, images) in enumerate(zip(texts, scenes, samples, strict=True)):
        request = parse(text)
        verdict = annotator.check(images, [text] * members)
        yield Group(
            name=f"alignment-{index}",
            dimension="alignment",
            prompt=text,
            images=images,
            judgements=tuple(judge_alignment(request, scene.category, shown) for shown in verdict.predicted),
        )
        grades = [round(5 - score) for score in quality(images).tolist()]
        rng = keyed_rng(seed, index, _STREAM)
        dimension = "portrait" if scene.category == "portrait" and index % 4 != 1 else "aesthetic"
        yield damaged_group(dimension, f"{dimension}-{index}", text, images, grades, rng, keep=0.5)


def _edited(
    base: Path, seed: int, count: int, split: Split, members: int, cache_dir: Path | None, first_id: int
) -> Iterator[Group]:
    annotator, quality = Verifier.load("annotator"), QualityScore.load("annotator")
    pairs: list[EditPair] = [make_edit(seed, _key(index, 2), split=split) for index in range(count)]
    prompts = Prompts(
        ids=tuple(range(first_id, first_id + count)),
        texts=tuple(pair.instruction for pair in pairs),
        categories=tuple(pair.category for pair in pairs),
        sources=torch.cat([render_tensor(pair.source) for pair in pairs]),
    )
    samples = sample(base, prompts, members=members, seed=seed, cache_dir=cache_dir)
    for index, (pair, images) in enumerate(zip(pairs, samples, strict=True)):
        shown = annotator.predict(images, [pair.category] * members)
        sound = quality(images) >= _SOUND
        looks = [read_look(image, pair.category) for image in images]
        flaws = [
            (IDENTITY,) * (look != look_of(pair.source)) + (DAMAGE,) * (not whole)
            for look, whole in zip(looks, sound.tolist(), strict=True)
        ]
        yield edit_group(index, pair, images, shown, looks, flaws, source=prompts.sources[index])


def _key(index: int, stream: int) -> int:
    """Scenes that no group of renders is made from."""
    return 2**41 + 4 * index + stream
