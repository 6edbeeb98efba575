"""PP-OCR through rapidocr, for any text: an optional extra."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from flow_rl.rewards.ocr import OCRReader


class RapidOCRReader(OCRReader):
    """The PP-OCR models that come inside the package ``rapidocr-onnxruntime`` (Apache-2.0).

    Args:
        min_side: images whose shorter side is smaller are enlarged (bicubic, by a whole factor) to at least this many
            pixels: the detector misses letters of less than about ten pixels.
        min_confidence: lines that the reader is less sure of than this, in [0, 1], are left out.

    Raises:
        ImportError: when the package is not installed; the message says how to install it.
        ValueError: for a setting outside its range.
    """

    def __init__(self, min_side: int = 320, min_confidence: float = 0.5) -> None:
        if min_side < 1 or not 0 <= min_confidence <= 1:
            raise ValueError(
                f"min_side must be positive and min_confidence in [0, 1], received {min_side} and {min_confidence}."
            )
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ImportError(
                "RapidOCRReader needs rapidocr: run `pip install rapidocr-onnxruntime==1.4.4`, or pass another "
                f"OCRReader. The import said: {error}"
            ) from error
        self.min_side = min_side
        self._engine = RapidOCR(text_score=min_confidence)

    def read(self, images: Tensor) -> list[str]:
        """All lines of each image, joined by line breaks; ``images`` (N, 3, H, W) in [0, 1]."""
        factor = math.ceil(self.min_side / min(images.shape[-2:]))
        if factor > 1:
            images = F.interpolate(images, scale_factor=factor, mode="bicubic", align_corners=False).clamp(0, 1)
        # rapidocr follows OpenCV: uint8, height x width x channels, blue first.
        pixels = (images.flip(1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return [self._lines(self._engine(image)[0]) for image in pixels]

    @staticmethod
    def _lines(found: list[list] | None) -> str:
        return "\n".join(str(text) for _, text, _ in found or [])
