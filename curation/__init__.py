"""Which prompts are worth training on, and with which weights: from raw scores of the base, before training."""

from curation.provenance import Provenance
from curation.scores import CuratedScores
from curation.selection import Selection, select_prompts

__all__ = ["CuratedScores", "Provenance", "Selection", "select_prompts"]
