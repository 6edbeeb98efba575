"""The one interface of rewards.

Shapes: N samples, H height, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flow_rl.rewards.fingerprints import attributes_digest

SCORE_MIN = 1.0
SCORE_MAX = 5.0


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a reward may look at.

    Attributes:
        images: generated images, float32 in [0, 1], shape (N, 3, H, W).
        prompts: the text each image was made from; for edits, the instruction. Length N.
        categories: semantic category of each prompt. Length N.
        sources: for edits, the source images, float32 in [0, 1], shape (N, 3, H, W); None for text-to-image.
    """

    images: Tensor
    prompts: Sequence[str]
    categories: Sequence[str]
    sources: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.images.shape[0]
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must have shape (N, 3, H, W), received {tuple(self.images.shape)}.")
        lengths = {"prompts": len(self.prompts), "categories": len(self.categories)}
        if self.sources is not None:
            lengths["sources"] = self.sources.shape[0]
        wrong = {name: length for name, length in lengths.items() if length != n}
        if wrong:
            raise ValueError(f"Expected {n} entries, one an image; received {wrong}.")

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def task(self) -> str:
        """`edit` where there are source images, else `t2i`."""
        return "t2i" if self.sources is None else "edit"


class Reward(ABC):
    """Scores images on the scale 1 (worst) to 5 (best)."""

    #: attributes that change no score, left out of the fingerprint
    not_in_fingerprint: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def score(self, samples: Samples) -> Tensor:
        """Score a batch.

        Args:
            samples: images with their prompts, N of them.

        Returns:
            float32 scores in [1, 5], shape (N,). NaN where a sample could not be scored: the trainer masks it.
            Never a made-up number. Lists, tuples and numpy arrays of N real numbers are taken as well.

        The samples stay as they are, and so do the settings of the process (`flow_rl.rewards.asking` checks both).
        """

    @property
    def judges_edits(self) -> bool:
        """Whether the scorer needs the source image of an edit; runs that ask it about other samples are refused."""
        return False

    def statistics(self) -> dict[str, float]:
        """Numbers about the scoring itself, for the logs: parse rate, latency and the like.

        Returns:
            Values over the samples scored since the last call, by name; empty if there is nothing to say.
        """
        return {}

    def fingerprint(self) -> str:
        """What the scores depend on, as a short hash: scores on disk are refused with another one.

        By default the class and its public attributes, with the weights of networks and the content of files. A
        reward whose files hide in another library's object adds them here; one that is served elsewhere can only
        count what it was told.
        """
        return attributes_digest(self, skip=self.not_in_fingerprint)
