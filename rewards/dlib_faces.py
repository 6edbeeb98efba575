"""dlib's face recognition network in torch, for photographs, with no package beyond the project's own.

The network is dlib's ``dlib_face_recognition_resnet_model_v1`` (Davis King, CC0), a ResNet with 29 convolutions trained
with a metric loss; the weights are those of face-api.js, which stores them in 8 bits (MIT).

Shapes: N faces, C channels, H height, W width, D = 128.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.face import Face, FaceEmbedder, SimilarityAnchors
from rewards.face_api_weights import load_weights
from rewards.tiny_face_detector import TinyFaceDetector

FACE_SIZE = 150
_MEAN = (122.782, 117.001, 104.298)  # red, green, blue, of 255
_BLOCKS = (("conv32", 3), ("conv64", 3), ("conv128", 2), ("conv256", 2))  # name, blocks that keep the size


class DlibEmbedder(FaceEmbedder):
    """Detects with face-api's tiny detector, embeds square crops with dlib's network.

    Crops are upright: no landmarks are aligned, so that heads tilted by more than about 20 degrees match less well.

    Args:
        directory: where face-api's ``tiny_face_detector_model`` and ``face_recognition_model`` files are (npm package
            ``@vladmandic/face-api``, folder ``model``).
        detector: finds the faces; None is the tiny detector with its defaults.
        margin: side of the crop over the longer side of the detected box, at least 1.

    Raises:
        FileNotFoundError: when weights are missing; the message says where to get them.
        ValueError: for a setting outside its range.
    """

    def __init__(self, directory: str | Path, detector: TinyFaceDetector | None = None, margin: float = 1.0) -> None:
        if margin < 1:
            raise ValueError(f"margin must be at least 1, received {margin}: a smaller crop cuts the face.")
        self.margin = margin
        self.detector = detector or TinyFaceDetector(directory)
        self._weights = load_weights(directory, "face_recognition_model")

    @property
    def anchors(self) -> SimilarityAnchors:
        """Means on the test's few photographs (docs/face_and_text_rewards.md): calibrate them on pairs of your own."""
        return SimilarityAnchors(different=0.85, same=0.95)

    @torch.no_grad()
    def faces(self, images: Tensor) -> list[list[Face]]:
        """Faces of images (N, 3, H, W) in [0, 1], best detection first."""
        found = []
        for image in images:
            boxes = self.detector.boxes(image)
            crops = [self._crop(image, box) for box in boxes]
            embeddings = F.normalize(self.descriptors(torch.stack(crops)), dim=-1) if crops else []
            found.append([Face(box=tuple(box), embedding=e) for box, e in zip(boxes.tolist(), embeddings, strict=True)])
        return found

    def _crop(self, image: Tensor, box: Tensor) -> Tensor:
        """A square around a box (4,), (3, FACE_SIZE, FACE_SIZE); black where it leaves the image."""
        left, top, right, bottom = box.tolist()
        half = self.margin * max(right - left, bottom - top) / 2
        center_x, center_y = (left + right) / 2, (top + bottom) / 2
        x, y, side = round(center_x - half), round(center_y - half), max(round(2 * half), 1)
        height, width = image.shape[1:]
        inside = image[:, max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)]
        missing = (max(-x, 0), max(x + side - width, 0), max(-y, 0), max(y + side - height, 0))
        square = F.pad(inside, missing)[None]
        return F.interpolate(square, size=FACE_SIZE, mode="bilinear", antialias=True)[0]

    def descriptors(self, faces: Tensor) -> Tensor:
        """Dlib's descriptors (N, D), not normalised, of crops (N, 3, 150, 150) in [0, 1]."""
        x = faces - torch.tensor(_MEAN).view(3, 1, 1) / 255
        x = F.max_pool2d(self._conv(x, "conv32_down", stride=2).relu(), 3, stride=2)
        for name, count in _BLOCKS:
            if name != "conv32":
                x = self._smaller(x, f"{name}_down")
            for index in range(1, count + 1):
                inner = self._conv(x, f"{name}_{index}/conv1", padding=1).relu()
                x = (x + self._conv(inner, f"{name}_{index}/conv2", padding=1)).relu()
        x = self._smaller(x, "conv256_down_out")
        return F.linear(x.mean((2, 3)), self._weights["fc"])

    def _smaller(self, x: Tensor, name: str) -> Tensor:
        """A residual block that halves the size and may double the channels; zeros fill what the shortcut lacks."""
        inner = self._conv(x, f"{name}/conv1", stride=2).relu()
        inner = self._conv(inner, f"{name}/conv2", padding=1)
        x = F.avg_pool2d(x, 2)
        if inner.shape[2:] != x.shape[2:]:
            inner = F.pad(inner, (0, 1, 0, 1))
        x = F.pad(x, (0, 0, 0, 0, 0, inner.shape[1] - x.shape[1]))
        return (x + inner).relu()

    def _conv(self, x: Tensor, name: str, *, stride: int = 1, padding: int = 0) -> Tensor:
        w = self._weights
        x = F.conv2d(x, w[f"{name}/conv/filters"], w[f"{name}/conv/bias"], stride=stride, padding=padding)
        return x * w[f"{name}/scale/weights"][:, None, None] + w[f"{name}/scale/biases"][:, None, None]
