"""Measures the avatar embedder on people it was never trained on, and writes ``IDENTITY.md``.

Shapes: N images, P people, D = 64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from demo.scorers.identity import FACE_THRESHOLD, IdentityNet, edit_once, is_held_out, person
from demo.world.degrade import break_patches, imitate_generator
from demo.world.edits import EDITABLE
from demo.world.render import details
from demo.world.vocabulary import CATEGORIES
from demo.world.world import Scene, keyed_rng, make_scene, render

SEED = 707
PEOPLE = 240  # the test split has 261 people that were kept out of training
_MAX_DRAWS = 100_000
TABLE = Path(__file__).parents[1] / "IDENTITY.md"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A distribution of similarities: its mean and its 5 % and 95 % quantiles."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """The spread of some values (N,)."""
        low, high = values.quantile(torch.tensor([0.05, 0.95])).tolist()
        return cls(mean=values.mean().item(), low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class IdentityNumbers:
    """Held-out numbers.

    Attributes:
        top_1: share of edited portraits whose nearest source, of all people's, is their own; by edited attribute.
        top_1_degraded: the same with degraded edits, over all attributes.
        similarities: similarity to the own source after an edit, by edited attribute.
        same: similarity to the own source, over all attributes.
        same_degraded: the same with degraded edits.
        different: similarity of different people.
        near: similarity of people who differ in one feature alone, by feature.
        order: probability that a same pair is more similar than a different pair (area under the ROC curve).
        portraits: share that is taken for a portrait, by kind of image.
    """

    top_1: dict[str, float]
    top_1_degraded: float
    similarities: dict[str, Spread]
    same: Spread
    same_degraded: Spread
    different: Spread
    near: dict[str, Spread]
    order: float
    portraits: dict[str, float]


def people(seed: int, count: int, *, held_out: bool) -> list[Scene]:
    """One portrait each of ``count`` different people, of the training or of the held-out part.

    Raises:
        ValueError: when there are not so many.
    """
    found: dict[tuple[str, ...], Scene] = {}
    for index in range(_MAX_DRAWS):
        scene = make_scene(seed, index, split="test" if held_out else "train", category="portrait")
        if is_held_out(scene) == held_out:
            found.setdefault(person(scene), scene)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"Asked for {count} people, found only {len(found)} in {_MAX_DRAWS} draws.")


def pixels(scenes: list[Scene]) -> Tensor:
    """Renders as uint8 (N, 3, 32, 32)."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def _floats(scenes: list[Scene]) -> Tensor:
    return pixels(scenes).float() / 255


@torch.no_grad()
def measure(net: IdentityNet, count: int = PEOPLE) -> IdentityNumbers:
    """Measure on ``count`` held-out people, each edited once in every attribute that can be edited."""
    scenes = people(SEED, count, held_out=True)
    generator = Generator().manual_seed(SEED)
    sources_PD = net(_floats(scenes))[0]
    top_1, similarities, all_same, all_different, degraded_same, degraded_hits = {}, {}, [], [], [], []
    for column, attribute in enumerate(EDITABLE["portrait"]):
        edited = [edit_once(scene, attribute, keyed_rng(SEED, row, column)) for row, scene in enumerate(scenes)]
        rows = torch.tensor([row for row, scene in enumerate(edited) if scene is not None])
        images = _floats([scene for scene in edited if scene is not None])
        similarity_NP = net(images)[0] @ sources_PD.T
        own = torch.arange(count)[None] == rows[:, None]
        top_1[attribute] = (similarity_NP.argmax(1) == rows).float().mean().item()
        similarities[attribute] = Spread.of(similarity_NP[own])
        all_same.append(similarity_NP[own])
        all_different.append(similarity_NP[~own])
        similarity_NP = net(imitate_generator(images, generator))[0] @ sources_PD.T
        degraded_same.append(similarity_NP[own])
        degraded_hits.append((similarity_NP.argmax(1) == rows).float())
    same, different = torch.cat(all_same), torch.cat(all_different)
    return IdentityNumbers(
        top_1=top_1 | {"all": sum(top_1.values()) / len(top_1)},
        top_1_degraded=torch.cat(degraded_hits).mean().item(),
        similarities=similarities,
        same=Spread.of(same),
        same_degraded=Spread.of(torch.cat(degraded_same)),
        different=Spread.of(different[:: len(different) // 100_000 + 1]),
        near=_near(net, scenes, sources_PD),
        order=_order(same, different),
        portraits=_portraits(net, scenes, generator),
    )


def _near(net: IdentityNet, scenes: list[Scene], sources_PD: Tensor) -> dict[str, Spread]:
    """Similarity of people to those who differ from them in one unnamed feature alone."""
    near = {}
    for column, feature in enumerate(("skinColor", "eyesVariant", "mouthVariant")):
        others = []
        for row, scene in enumerate(scenes):
            values = [value for value in details("portrait")[feature] if value != scene.options[feature]]
            value = str(keyed_rng(SEED, row, 50 + column).choice(values))
            others.append(replace(scene, options=scene.options | {feature: value}))
        near[feature] = Spread.of((net(_floats(others))[0] * sources_PD).sum(1))
    return near


def _order(same: Tensor, different: Tensor) -> float:
    below = torch.searchsorted(different.sort().values, same)
    return (below.double() / len(different)).mean().item()


def _portraits(net: IdentityNet, scenes: list[Scene], generator: Generator) -> dict[str, float]:
    images = _floats(scenes)
    n = len(images)
    shown = {
        "portrait": images,
        "portrait, degraded": imitate_generator(images, generator),
        "portrait in pieces": break_patches(images, torch.ones(n), generator).clamp(0, 1),
        "one colour": torch.rand(n, 3, 1, 1, generator=generator).expand(n, 3, 32, 32),
    }
    for category in CATEGORIES:
        if category != "portrait":
            shown[category] = _floats([make_scene(SEED, i, split="test", category=category) for i in range(100)])
    return {kind: (net(x)[1].sigmoid() >= FACE_THRESHOLD).float().mean().item() for kind, x in shown.items()}


def write_table(numbers: IdentityNumbers, *, seconds: float) -> None:
    """Write ``IDENTITY.md``; ``seconds`` is the processor time of rendering and training."""

    def cells(spread: Spread) -> str:
        return f"{spread.mean:.2f} | {spread.low:.2f} to {spread.high:.2f}"

    lines = [
        "# The avatar embedder, on people it was never trained on",
        "",
        f"Written by `python -m demo.making.train_identity` ({seconds:.0f} s of processor time for rendering and "
        "training).",
        f"{PEOPLE} people of the test split, each edited once in every attribute; who a person is, and which people",
        "were kept out of training: `demo/scorers/identity.py`. Similarity is the cosine with the unedited portrait.",
        "*Degraded* renders are moved, bent, blurred, recoloured and made noisy at random.",
        "",
        "| edited attribute | top-1 of all people | similarity to oneself, mean | 5 % to 95 % |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {numbers.top_1[name]:.3f} | {cells(s)} |" for name, s in numbers.similarities.items()]
    lines += [
        f"| all | {numbers.top_1['all']:.3f} | {cells(numbers.same)} |",
        f"| all, degraded | {numbers.top_1_degraded:.3f} | {cells(numbers.same_degraded)} |",
        "",
        "| another person | similarity, mean | 5 % to 95 % |",
        "|---|---|---|",
        f"| any other | {cells(numbers.different)} |",
    ]
    lines += [f"| other {name.removesuffix('Variant')} alone | {cells(s)} |" for name, s in numbers.near.items()]
    lines += [
        "",
        f"A same pair is more similar than a different pair with probability {numbers.order:.4f}. The means of *all*",
        "and *any other* are the reward's anchors: 5 and 1.",
        "",
        f"| image | taken for a portrait (probability of at least {FACE_THRESHOLD}) |",
        "|---|---|",
    ]
    lines += [f"| {kind} | {share:.3f} |" for kind, share in numbers.portraits.items()]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
