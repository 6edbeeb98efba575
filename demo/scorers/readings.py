"""What one image shows, as probabilities of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Letters(Protocol):
    """The letters of one image."""

    def text(self) -> str:
        """The likeliest text."""

    def text_probability(self, text: str) -> float:
        """How likely a text is, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Probabilities of one image's attribute values.

    Attributes:
        tables: attribute to its values and their probabilities.
        letters: of a card; None for other categories.
    """

    tables: Mapping[str, tuple[Sequence[str], Sequence[float]]]
    letters: Letters | None = None

    def value(self, name: str) -> str:
        """The likeliest value of an attribute."""
        if name == "text":
            assert self.letters is not None
            return self.letters.text()
        values, probabilities = self.tables[name]
        return values[max(range(len(values)), key=probabilities.__getitem__)]

    def probability(self, name: str, value: str) -> float:
        """How likely a value of an attribute is, in [0, 1]."""
        if name == "text":
            assert self.letters is not None
            return self.letters.text_probability(value)
        values, probabilities = self.tables[name]
        return probabilities[values.index(value)]
