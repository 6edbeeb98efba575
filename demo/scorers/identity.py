"""Who an avatar is: an embedding of portraits that stays where it is under edits.

The identity of an avatar is its skin, eyes, mouth, hair and beard (``person``). Glasses, shirt and background are no
part of it, and one changed thing out of hair, hair colour and beard makes no other person, because edits may ask for
that. Trained by ``python -m demo.making.train_identity``, measured in ``demo/IDENTITY.md``.

Shapes: N images, C = 3, H = W = 32, D = 64.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from demo.scorers.weights import ASSETS
from demo.world.edits import apply_edit, is_edit
from demo.world.world import Scene, attribute_values
from flow_rl.rewards.face import Face, FaceEmbedder, SimilarityAnchors

WEIGHTS = ASSETS / "identity.safetensors"
FACE_THRESHOLD = 0.5  # an image with a lower portrait probability shows no face

_FEATURES = ("skinColor", "eyesVariant", "mouthVariant")  # of the renderer: unnamed, so that no edit can change them
_NAMED_FEATURES = ("hair", "hair_color", "beard")
ACCESSORIES = ("glasses", "shirt", "background")


def person(scene: Scene) -> tuple[str, ...]:
    """Everything that identity is made of, of a portrait."""
    return tuple(
        [str(scene.options[name]) for name in _FEATURES]
        + [scene.attributes.get(name, "none") for name in _NAMED_FEATURES]
    )


def is_held_out(scene: Scene) -> bool:
    """Whether the person is one of the fifth that is never trained on."""
    digest = hashlib.blake2b("|".join(person(scene)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 5 == 0


def edit_once(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene | None:
    """The scene with another value of one attribute; None when it has no other value."""
    values = [v for v in attribute_values("portrait")[attribute] if is_edit(scene, attribute, v)]
    return apply_edit(scene, attribute, str(rng.choice(values))) if values else None


def vary(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another picture of the same person: other accessories, and half of the time one edit of hair or beard."""
    attributes = [name for name in ACCESSORIES if rng.random() < 0.7]
    if rng.random() < 0.5:
        attributes.append(str(rng.choice(_NAMED_FEATURES)))
    for attribute in attributes:
        scene = edit_once(scene, attribute, rng) or scene
    return scene


class IdentityNet(nn.Module):
    """A small CNN with two heads: who it is, and whether it is a portrait at all."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, 16, 32, 64, 64)
        for index, (channels_in, channels_out) in enumerate(pairwise(widths)):
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
            ]
            if index < 3:
                layers.append(nn.MaxPool2d(2))
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1))
        self.identity = nn.Linear(64 * 16, 64)
        self.portrait = nn.Linear(64 * 16, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of norm 1, (N, D), and portrait logits (N,), of images (N, 3, 32, 32) in [0, 1]."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 32, 32):
            raise ValueError(f"images must have shape (N, 3, 32, 32), received {tuple(images.shape)}.")
        features = self.trunk((images - 0.5) * 4)
        return F.normalize(self.identity(features), dim=-1), self.portrait(features)[:, 0]


class AvatarEmbedder(FaceEmbedder):
    """The demo world's face embedder.

    An image is one face as large as itself when the network's second head says that it is a portrait (probability of
    at least ``FACE_THRESHOLD``), and no face otherwise. That head was trained on portraits against renders of the
    other categories, portraits that were broken to pieces, and images of one colour.

    Args:
        weights: a file written by ``python -m demo.making.train_identity``.

    Raises:
        FileNotFoundError: when the weights have not been trained.
    """

    def __init__(self, weights: str | Path = WEIGHTS) -> None:
        if not Path(weights).exists():
            raise FileNotFoundError(f"{weights} is missing: train it with `python -m demo.making.train_identity`.")
        with safe_open(weights, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping, has only keys())
            measured = file.metadata()
        self.net = IdentityNet()
        self.net.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in state.items()}, strict=True
        )
        self.net.eval().requires_grad_(False)
        self._anchors = SimilarityAnchors(different=float(measured["different"]), same=float(measured["same"]))

    @property
    def anchors(self) -> SimilarityAnchors:
        """Mean similarities of different people and of one person before and after an edit, on held-out people."""
        return self._anchors

    def faces(self, images: Tensor) -> list[list[Face]]:
        """At most one face for each of the images (N, 3, 32, 32)."""
        embeddings, logits = self.net(images)
        box = (0.0, 0.0, float(images.shape[-1]), float(images.shape[-2]))
        return [
            [Face(box=box, embedding=embedding)] if probability >= FACE_THRESHOLD else []
            for embedding, probability in zip(embeddings, logits.sigmoid().tolist(), strict=True)
        ]
