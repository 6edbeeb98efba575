"""A small face detector for photographs: YOLO v2's head on six separable convolutions.

A torch port of the tiny face detector of face-api.js (MIT), whose weights it reads.

Shapes: N images, H height, W width, S cells of the grid (13 for 416 pixels), A = 5 anchor boxes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from rewards.face_api_weights import load_weights

_ANCHORS = (
    (1.603231, 2.094468),
    (6.041143, 7.080126),
    (2.882459, 3.518061),
    (4.266906, 5.178857),
    (9.041765, 10.66308),
)
_MEAN = (117.001, 114.697, 97.404)  # red, green, blue, of 255
_SLOPE = 0.1
_OVERLAP = 0.4  # of two boxes (intersection over union) that are the same face


class TinyFaceDetector:
    """Finds faces.

    Args:
        directory: where face-api's ``tiny_face_detector_model`` files are.
        input_size: what an image is scaled to, its border included, in pixels; a multiple of 32. Faces of less than
            about an eighth of it are often missed.
        threshold: boxes with a lower score, in (0, 1), are left out.
        border: width of a black border around the image, as a share of its longer side. Without one, faces that the
            image cuts are missed.

    Raises:
        FileNotFoundError: when the weights are missing.
        ValueError: for a setting outside its range.
    """

    def __init__(
        self, directory: str | Path, input_size: int = 416, threshold: float = 0.5, border: float = 0.25
    ) -> None:
        if input_size <= 0 or input_size % 32 or not 0 < threshold < 1 or border < 0:
            raise ValueError(
                "input_size must be a positive multiple of 32, threshold in (0, 1) and border at least 0, received "
                f"{input_size}, {threshold} and {border}."
            )
        self.input_size = input_size
        self.threshold = threshold
        self.border = border
        self._weights = load_weights(directory, "tiny_face_detector_model")

    def boxes(self, image: Tensor) -> Tensor:
        """Boxes of the faces of one image, best first.

        Args:
            image: float32 (3, H, W) in [0, 1].

        Returns:
            float32 (faces, 4): left, top, right, bottom in pixels, not clipped to the image.
        """
        height, width = image.shape[1:]
        border = round(self.border * max(height, width))
        side = max(height, width) + 2 * border
        # Square, so that one factor scales both sides.
        square = F.pad(image, (border, side - width - border, border, side - height - border))[None]
        if side != self.input_size:
            square = F.interpolate(square, size=self.input_size, mode="bilinear", antialias=True)
        boxes, scores = self.decode(self.grid(square))
        likely = scores > self.threshold
        boxes, scores = boxes[likely] * side - border, scores[likely]
        return boxes[nms(boxes, scores, _OVERLAP)]

    def grid(self, images: Tensor) -> Tensor:
        """The network: images (N, 3, input_size, input_size) in [0, 1] to (N, 5 A, S, S)."""
        w = self._weights
        x = images - torch.tensor(_MEAN).view(3, 1, 1) / 255
        x = F.leaky_relu(F.conv2d(x, w["conv0/filters"], w["conv0/bias"]), _SLOPE)
        for index in range(1, 6):
            x = F.max_pool2d(x, 2, ceil_mode=True)
            depthwise = w[f"conv{index}/depthwise_filter"]
            x = F.conv2d(x, depthwise, padding=1, groups=len(depthwise))
            x = F.leaky_relu(F.conv2d(x, w[f"conv{index}/pointwise_filter"], w[f"conv{index}/bias"]), _SLOPE)
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, stride=1)
        return F.conv2d(x, w["conv8/filters"], w["conv8/bias"])

    @staticmethod
    def decode(grid: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (S S A, 4) as shares of the square image, and scores (S S A,), of one image's grid (1, 5 A, S, S)."""
        cells = grid.shape[-1]
        x, y, width, height, score = grid.view(len(_ANCHORS), 5, cells, cells).unbind(1)  # each (A, S, S)
        row, column = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
        anchor_width, anchor_height = torch.tensor(_ANCHORS).T[:, :, None, None]
        center_x, center_y = column + x.sigmoid(), row + y.sigmoid()
        half_width, half_height = width.exp() * anchor_width / 2, height.exp() * anchor_height / 2
        edges = (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)
        return torch.stack(edges, dim=-1).flatten(0, 2) / cells, score.sigmoid().flatten()
