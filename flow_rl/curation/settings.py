"""What `train.py curate` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CurationSettings:
    """What `curate` does."""

    scores: str
    """The file of scores. What is in it already is not sampled again, so a killed run goes on, and another threshold
    costs nothing."""
    threshold: float = 0.5
    """A prompt stays where the range of the composite over its images exceeds this, in points of the 1..5 scale."""
    members: int | None = None
    """Images a prompt; null for the rollout's own group size."""
    batch_size: int = 16
    """Prompts a batch: what a kill can lose, and what ranks share."""
    propose: str | None = None
    """Also suggest a table of weights by category, with reasons, in this YAML file."""

    def __post_init__(self) -> None:
        if self.members is not None and self.members < 2:
            raise ValueError(f"curation.members is {self.members}; a range needs at least 2 images a prompt.")
        if self.batch_size < 1:
            raise ValueError(f"curation.batch_size is {self.batch_size}; it must be at least 1.")
        if not 0 <= self.threshold < 4:
            raise ValueError(f"curation.threshold is {self.threshold}; a range lies in [0, 4]: take 0 to below 4.")
        if Path(self.scores).is_dir():
            raise ValueError(f"flow_rl.curation.scores is '{self.scores}', a directory; it must be a file.")
