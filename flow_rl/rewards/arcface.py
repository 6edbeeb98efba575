"""ArcFace through insightface, for photographs: an optional extra.

The tests have no access to insightface's weights. They replace insightface by a stand-in that finds coloured squares,
and check the whole way from pixels to scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flow_rl.rewards.face import Face, FaceEmbedder, SimilarityAnchors


class ArcFaceEmbedder(FaceEmbedder):
    """RetinaFace/SCRFD detection and ArcFace embedding (Deng et al. 2019, arXiv 1801.07698) by insightface.

    insightface downloads its model packs at first use, and licenses its own for non-commercial research only.

    Args:
        model: name of an insightface model pack.
        root: directory that holds (or receives) model packs.
        detection_size: pixels that the longer side of an image is scaled to for detection; a multiple of 32.
        providers: onnxruntime execution providers, in order of preference.

    Raises:
        ImportError: when insightface is not installed; the message says how to install it.
        ValueError: for a detection size that is no positive multiple of 32.
    """

    def __init__(
        self,
        model: str = "buffalo_l",
        root: str = "~/.insightface",
        detection_size: int = 640,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        if detection_size <= 0 or detection_size % 32:
            raise ValueError(f"detection_size must be a positive multiple of 32, received {detection_size}.")
        try:
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise ImportError(
                "ArcFaceEmbedder needs insightface: run `pip install insightface onnxruntime`, or use another "
                f"flow_rl.rewards.face.FaceEmbedder. The import said: {error}"
            ) from error
        self._app = FaceAnalysis(
            name=model, root=root, allowed_modules=["detection", "recognition"], providers=list(providers)
        )
        self._app.prepare(ctx_id=0, det_size=(detection_size, detection_size))

    @property
    def anchors(self) -> SimilarityAnchors:
        """Starting values, not measured here: calibrate them on pairs of your own."""
        return SimilarityAnchors(different=0.1, same=0.6)

    def faces(self, images: Tensor) -> list[list[Face]]:
        """Faces of images (N, 3, H, W) in [0, 1]."""
        # insightface follows OpenCV: uint8, height x width x channels, blue first.
        pixels = (images.flip(1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return [[_face(found) for found in self._app.get(image)] for image in pixels]


def _face(found: Any) -> Face:
    embedding = torch.as_tensor(found.normed_embedding, dtype=torch.float32)
    left, top, right, bottom = (float(edge) for edge in found.bbox)
    return Face(box=(left, top, right, bottom), embedding=embedding)
