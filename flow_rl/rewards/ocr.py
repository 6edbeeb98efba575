"""Text rendering: does the image say what the prompt asks it to say.

Shapes: N samples, H height, W width.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.text import edit_distance

from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Reward, Samples
from flow_rl.rewards.pixels import finite_images

TextExtractor = Callable[[str], str | None]

# A straight or single quote only opens after, and closes before, something that is no word: "don't" quotes nothing.
_QUOTED = re.compile(
    r"\"([^\"]+)\"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|『([^』]+)』"
    r"|‘((?:[^’]|’(?=\w))+)’(?!\w)|(?<!\w)'((?:[^']|'(?=\w))+)'(?!\w)"
)


def quoted_text(prompt: str) -> str | None:
    """What a prompt puts in quotation marks, pieces joined by a space; None when it quotes nothing."""
    pieces = [next(group for group in match.groups() if group) for match in _QUOTED.finditer(prompt)]
    return " ".join(pieces) if any(piece.strip() for piece in pieces) else None


class OCRReader(ABC):
    """Reads the text of images."""

    @abstractmethod
    def read(self, images: Tensor) -> list[str]:
        """Read.

        Args:
            images: float32 (N, 3, H, W) in [0, 1], on the CPU.

        Returns:
            for each image all its text in reading order; "" where it shows none.
        """


class OCRReward(Reward):
    """How close the text in an image is to the text that its prompt asks for, 1..5.

    ``1 + 4 (1 - d / max(length requested, length read))``, with d the edit distance (Levenshtein) between the two.
    Both are compared without white space, because readers disagree about word gaps, and in Unicode's compatibility
    form (NFKC). Text beyond what was asked for costs as much as text that is missing. A prompt that asks for no text
    scores NaN.

    Args:
        reader: reads images.
        extractor: the text that a prompt asks for, None where it asks for none. The default takes what is quoted.
        case_sensitive: whether "Open" for "OPEN" is wrong.
    """

    def __init__(
        self, reader: OCRReader, extractor: TextExtractor = quoted_text, *, case_sensitive: bool = False
    ) -> None:
        self.reader = reader
        self.extractor = extractor
        self.case_sensitive = case_sensitive

    @torch.no_grad()
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the prompt asks for no text, or the image is not finite."""
        images, finite = finite_images(samples.images)
        requested = {}
        for row, prompt in enumerate(samples.prompts):
            text = self.extractor(prompt) if finite[row] else None
            if text is not None and self._normalise(text):
                requested[row] = self._normalise(text)
        scores = torch.full((len(samples),), torch.nan)
        if not requested:
            return scores
        read = [self._normalise(text) for text in self.reader.read(images[list(requested)])]
        for (row, wanted), found in zip(requested.items(), read, strict=True):
            scores[row] = SCORE_MIN + (SCORE_MAX - SCORE_MIN) * text_similarity(wanted, found)
        return scores

    def _normalise(self, text: str) -> str:
        text = "".join(unicodedata.normalize("NFKC", text).split())
        return text if self.case_sensitive else text.casefold()


def text_similarity(requested: str, read: str) -> float:
    """1 minus the edit distance over the longer length: 1 for equal texts, 0 for texts with nothing in common."""
    if not requested and not read:
        return 1.0
    return 1 - edit_distance(read, requested).item() / max(len(requested), len(read))
