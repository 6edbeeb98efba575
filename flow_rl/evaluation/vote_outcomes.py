"""What the votes on images say: an outcome for each pair, a score for each image, and a split by prompt.

The score of an image is the posterior mean of its win share under a uniform prior (Laplace's rule of succession),
mapped to 1..5. Squared error, which reward fine-tuning minimises, is smallest there. An image with one vote stays near
the middle: 3.67 if it won, 2.33 if it lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flow_rl.evaluation.vote_files import Key, Vote

Outcome = Literal["first", "second", "tie", "none"]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """All votes on one pair of images.

    Attributes:
        key: prompt id and member.
        first: name of the model that comes first in the alphabet.
        second: name of the other.
        votes: on this pair, one or more, in the order of the files.
    """

    key: Key
    first: str
    second: str
    votes: tuple[Vote, ...]

    @property
    def credits(self) -> list[float]:
        """Credit of the first model in each vote."""
        return [vote.credit if vote.first == self.first else 1 - vote.credit for vote in self.votes]

    @property
    def contradictory(self) -> bool:
        """Whether each of the two images was preferred by somebody."""
        return min(self.credits) < 0.5 < max(self.credits)

    @property
    def outcome(self) -> Outcome:
        """What more than half of the votes say; `none` where they say nothing so clearly."""
        counts: dict[Outcome, int] = {
            "first": sum(credit > 0.5 for credit in self.credits),
            "second": sum(credit < 0.5 for credit in self.credits),
            "tie": sum(credit == 0.5 for credit in self.credits),
        }
        return next((name for name, count in counts.items() if 2 * count > len(self.votes)), "none")


def tallies(votes: Sequence[Vote]) -> list[Tally]:
    """Votes by pair of images, in the order in which the pairs first occur."""
    found: dict[tuple[Key, str, str], list[Vote]] = {}
    for vote in votes:
        first, second = sorted((vote.first, vote.second))
        found.setdefault((vote.key, first, second), []).append(vote)
    return [Tally(key=key, first=a, second=b, votes=tuple(all_)) for (key, a, b), all_ in found.items()]


def win_score(won: float, votes: int) -> float:
    """Score of an image, in (1, 5): `1 + 4 (won + 1) / (votes + 2)`.

    Args:
        won: votes for the image, a tie counting half, in [0, votes].
        votes: in which it took part.
    """
    return 1 + 4 * (won + 1) / (votes + 2)


def image_scores(found: Sequence[Tally]) -> dict[tuple[str, Key], float]:
    """`win_score` of every image, by model and (prompt id, member), over all votes that it took part in."""
    won: dict[tuple[str, Key], list[float]] = {}
    for tally in found:
        won.setdefault((tally.first, tally.key), []).extend(tally.credits)
        won.setdefault((tally.second, tally.key), []).extend(1 - credit for credit in tally.credits)
    return {image: win_score(sum(credits), len(credits)) for image, credits in won.items()}


def held_out(prompt: int, share: float) -> bool:
    """Whether a prompt is one of the validation's: a function of its id alone, so that every file is cut alike.

    Args:
        prompt: its id.
        share: of the prompts, in [0, 1]; a larger share holds out the same prompts and more.
    """
    digest = hashlib.sha256(f"prompt:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
