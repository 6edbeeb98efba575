"""What a reward may return, and how a run says that it returned something else.

Shapes: N samples.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flow_rl.errors import RunStopped
from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Reward

#: rounding that a score may show beyond the scale
TOLERANCE = 1e-4
#: how much of a text that a reward returned a message quotes
QUOTED = 60
EXPECTED = (
    f"Expected float32 scores, shape ({{count}},), from {SCORE_MIN:g} to {SCORE_MAX:g}, NaN where a sample cannot be "
    "scored"
)


class ContractBroken(RunStopped, ValueError):
    """A reward returned what is no score, or changed what it was only shown."""


class ScoringRaised(RunStopped):
    """A reward raised an error, which is the cause of this one."""


class Unacceptable(ValueError):
    """What is wrong with a returned value: `received` in words, and what to do about it.

    Args:
        received: completes "Reward 'x' returned ...".
        advice: a sentence; empty where the expectation says enough.
    """

    def __init__(self, received: str, advice: str = "") -> None:
        super().__init__(f"{received}. {advice}".rstrip())
        self.received, self.advice = received, advice


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Who is asked.

    Attributes:
        name: of the outermost reward, as the config has it.
        place: dotted name of the setting that this reward is.
        reward: the scorer.
    """

    name: str
    place: str
    reward: Reward

    @property
    def where(self) -> str:
        """The setting and the class, for messages."""
        kind = type(self.reward)
        return f"{self.place}, class {kind.__module__}.{kind.__qualname__}"

    def broken(self, received: str, count: int, advice: str = "", *, did: str = "returned") -> ContractBroken:
        """The error for a value that is no score."""
        expected = EXPECTED.format(count=count)
        return ContractBroken(f"Reward '{self.name}' {did} {received}. {expected} ({self.where}). {advice}".rstrip())


def as_scores(value: Any, count: int) -> Tensor:
    """A returned value as scores that nobody else can change, on the device they came from.

    Does not wait for a device. `in_range` checks the numbers themselves.

    Args:
        value: a tensor, a numpy array, a list or a tuple of real numbers, in which None stands for NaN.
        count: N.

    Returns:
        float32, shape (N,), detached, a copy.

    Raises:
        Unacceptable: another type, kind of number or shape.
    """
    scores = _tensor(value)
    if scores.shape != (count,):
        raise Unacceptable(f"shape {tuple(scores.shape)} for {count} samples", _advice_on_shape(scores.shape, count))
    return scores.detach().to(torch.float32, copy=True)


def in_range(scores: Tensor, *, infinities: bool = False) -> Tensor:
    """Scores (N,) on the CPU.

    Args:
        scores: float32, on any device.
        infinities: let infinities pass: the caller counts them as samples that could not be scored.

    Raises:
        Unacceptable: a number off the scale.
    """
    scores = scores.cpu()
    off = (scores < SCORE_MIN - TOLERANCE) | (scores > SCORE_MAX + TOLERANCE)
    if infinities:
        off &= scores.isfinite()
    if off.any():
        known = scores[~scores.isnan()]
        first = int(off.nonzero()[0])
        raise Unacceptable(
            f"scores from {known.min():.3f} to {known.max():.3f} (sample {first} of {len(scores)} has "
            f"{scores[first]:.6g}, {int(off.sum())} are off the scale); the scale is {SCORE_MIN:g}..{SCORE_MAX:g}",
            "Map the scores to the scale. A sample that cannot be scored must be NaN.",
        )
    return scores


def coarse(value: Any) -> str | None:
    """The dtype of a returned value if it keeps fewer digits than float32, else None."""
    if isinstance(value, Tensor) and value.is_floating_point() and torch.finfo(value.dtype).bits < 32:
        return str(value.dtype)
    if isinstance(value, np.ndarray) and value.dtype == np.float16:
        return "numpy.float16"
    return None


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return _plain(value)
    if isinstance(value, np.ndarray):
        return _from_numpy(value)
    if isinstance(value, (list, tuple)):
        return _from_sequence(value)
    raise Unacceptable(*_other(value))


def _plain(value: Tensor) -> Tensor:
    if value.dtype == torch.bool or value.is_complex():
        raise Unacceptable(f"a tensor of {value.dtype}", "Say how good each image is as a number on the scale.")
    if value.is_meta or value.is_nested or value.is_quantized or value.layout != torch.strided:
        kind = "meta" if value.is_meta else "nested" if value.is_nested else str(value.layout)
        raise Unacceptable(f"a tensor without plain values ({kind})", "Return a dense tensor.")
    return value


def _from_numpy(value: np.ndarray) -> Tensor:
    if value.dtype.kind not in "fiu":
        raise Unacceptable(f"a numpy array of {value.dtype}", "Its entries must be real numbers.")
    numbers_ = value.astype(np.float64)
    if isinstance(numbers_, np.ma.MaskedArray):  # what lies under the mask is no score
        numbers_ = numbers_.filled(np.nan)
    return torch.from_numpy(np.array(numbers_))


def _from_sequence(value: Sequence[Any]) -> Tensor:
    shapes = {tuple(np.shape(entry)) for entry in value if isinstance(entry, (list, tuple, np.ndarray, Tensor))}
    for index, entry in enumerate(value):
        if isinstance(entry, (list, tuple, np.ndarray, Tensor)) and np.shape(entry) != ():
            kind = type(value).__name__
            raise Unacceptable(
                f"a {kind} whose entry {index} has shape {sorted(shapes)[-1]}", "Each entry must be one number."
            )
    return torch.tensor([_number(entry, index, type(value).__name__) for index, entry in enumerate(value)])


def _number(entry: Any, index: int, kind: str) -> float:
    if entry is None:
        return np.nan
    if isinstance(entry, (Tensor, np.ndarray)):
        entry = entry.item()
    if isinstance(entry, numbers.Real) and not isinstance(entry, (bool, np.bool_)):
        try:
            return float(entry)
        except OverflowError:
            return float("inf")  # whatever its sign: it lies off the scale
    raise Unacceptable(f"a {kind} whose entry {index} is {described(entry)}", "Its entries must be real numbers.")


def described(value: Any) -> str:
    """A value in a few words, whatever its size."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the text {value[:QUOTED]!r}"
    if isinstance(value, (bool, np.bool_, int, float, complex)):
        return f"the {type(value).__name__} {str(value)[:QUOTED]}"
    return f"a {type(value).__name__}"


def _other(value: Any) -> tuple[str, str]:
    """Words for a value that is no collection of numbers, and what to do."""
    if value is None:
        return "nothing (None)", "Does `score` end in `return scores`?"
    if inspect.isawaitable(value):
        if inspect.iscoroutine(value):
            value.close()  # else Python complains later that nobody waited for it
        return (
            f"a {type(value).__name__}",
            "`score` must not be `async def`: subclass flow_rl.rewards.background.AsyncReward.",
        )
    if isinstance(value, Mapping):
        keys = ", ".join(repr(key)[:QUOTED] for key in list(value)[:5])
        return f"a {type(value).__name__} with the keys {keys}", "Return the scores alone; `statistics()` is for logs."
    if isinstance(value, (set, frozenset)):
        return f"a {type(value).__name__}", "It has no order: nobody can tell whose score is whose."
    if isinstance(value, (bool, int, float, complex)):
        return described(value), "One number for all samples says nothing about any of them."
    return described(value), ""


def _advice_on_shape(shape: Sequence[int], count: int) -> str:
    if tuple(shape) == (count, 1):
        return "Return `scores.squeeze(1)`."
    if tuple(shape) == (1, count):
        return "Return `scores.squeeze(0)`."
    if len(shape) == 0:
        return "One number for all samples says nothing about any of them."
    if len(shape) == 1:
        return "Return one score a sample, in their order."
    return "Reduce it to one score a sample."
