"""The one place where a reward is called: what comes back is checked, what was handed out stays as it was.

Training, evaluation, curation, monitors, the scoring service and rewards that wrap others all ask here, so every fault
of a reward ends in the same message: the reward's name, its place in the config, what was received, what was expected.

Shapes: N samples.
"""

from __future__ import annotations

import contextvars
import inspect
import numbers
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flow_rl.errors import RunStopped
from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.contract import (
    Asked,
    ContractBroken,
    ScoringRaised,
    Unacceptable,
    as_scores,
    coarse,
    described,
    in_range,
)
from flow_rl.rewards.patience import standing, took, watch, watched
from flow_rl.rewards.surroundings import ProcessState, Shown

if TYPE_CHECKING:
    from flow_rl.rewards.background import AsyncReward

#: what `test` puts before the names of `model.judges`, beside which the rewards score
JUDGE = "judge/"

_asked: contextvars.ContextVar[Asked | None] = contextvars.ContextVar("asked", default=None)


@dataclass(frozen=True, kw_only=True)
class Received:
    """What a reward returned: its type and shape are checked, its numbers not yet, as they may still be computed.

    Attributes:
        asked: who returned it.
        scores: float32 (N,), on the device that they are computed on.
        infinities: whether infinities pass.
    """

    asked: Asked
    scores: Tensor
    infinities: bool = False

    def result(self) -> Tensor:
        """The scores (N,) on the CPU; waits for their device.

        Raises:
            ContractBroken: a number off the scale.
        """
        try:
            return in_range(self.scores, infinities=self.infinities)
        except Unacceptable as error:
            raise self.asked.broken(error.received, len(self.scores), error.advice) from None


def ask(
    reward: Reward,
    samples: Samples,
    name: str,
    *,
    section: str | None = "model.rewards",
    setting: str | None = None,
    infinities: bool = False,
) -> Tensor:
    """Scores of a batch.

    Args:
        reward: the scorer.
        samples: N of them. The reward sees these images, and copies of the lists.
        name: of the reward.
        section: of the config that names it; None where no config does.
        setting: of a reward inside another one, which setting of it it is, such as `init_args.reward`; None is `name`.
        infinities: let infinities pass, for callers that count them as samples that could not be scored.

    Returns:
        float32, shape (N,), on the CPU, a copy.

    Raises:
        ContractBroken: what came back is no score, or the reward changed the samples.
        ScoringRaised: the reward raised an error, which is the cause.
        RunStopped: raised by the reward itself, to end the run with its own message.
    """
    return call(reward, samples, name, section=section, setting=setting, infinities=infinities).result()


def call(
    reward: Reward,
    samples: Samples,
    name: str,
    *,
    section: str | None = "model.rewards",
    setting: str | None = None,
    infinities: bool = False,
) -> Received:
    """`ask` without waiting for the device that computes the scores."""
    asked = _who(reward, name, section, setting)
    with _guarded(asked, samples) as shown:
        value = reward.score(shown)
    return _accepted(asked, value, len(samples), infinities=infinities)


def submit(
    reward: AsyncReward, samples: Samples, name: str, *, section: str | None = "model.rewards"
) -> Future[Tensor]:
    """Begin to score a batch, see `AsyncReward.submit`; the future gives and raises what `ask` does.

    Cancelling it cancels the reward's own future.
    """
    asked = _who(reward, name, section)
    with _guarded(asked, samples) as shown:
        inner = reward.submit(shown)
    if not isinstance(inner, Future):
        if inspect.iscoroutine(inner):
            inner.close()
        advice = "Return a concurrent.futures.Future whose result are the scores."
        raise asked.broken(described(inner), len(samples), advice, did="submitted a batch and returned")
    return _checked_later(asked, inner, len(samples))


def statistics_of(reward: Reward, name: str, *, section: str = "model.rewards") -> dict[str, float]:
    """What a reward says of its own scoring, see `Reward.statistics`; what is no number is left out, with a warning."""
    asked = _who(reward, name, section)
    wrong: dict[Any, Any]
    found: Any
    try:
        found = reward.statistics()
        wrong = {} if isinstance(found, Mapping) else {"": found}
        if isinstance(found, Mapping):
            wrong = {key: value for key, value in found.items() if not (isinstance(key, str) and _is_number(value))}
            found = {key: float(value) for key, value in found.items() if key not in wrong}
    except Exception as error:  # a run does not end for the sake of its logs
        wrong, found = {"": error}, {}
    if wrong:
        key, value = next(iter(wrong.items()))
        entry = f" with {described(value)} as {key!r}" if key != "" else f": {described(value)}"
        warnings.warn(
            f"Reward '{asked.name}' returned statistics{entry} ({asked.where}). Expected a dict of numbers by name. "
            "They are left out of the logs.",
            stacklevel=2,
        )
    return dict(found) if isinstance(found, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1)


def _who(reward: Reward, name: str, section: str | None, setting: str | None = None) -> Asked:
    outer = _asked.get()
    if outer is not None:
        return Asked(name=outer.name, place=f"{outer.place}.{setting or name}", reward=reward)
    short = name.removeprefix(JUDGE)
    if short != name:
        section = "model.judges"
    return Asked(name=name, place=short if section is None else f"{section}.{short}", reward=reward)


@contextmanager
def _guarded(asked: Asked, samples: Samples) -> Iterator[Samples]:
    """Hand out samples; afterwards check that they and the process are as before."""
    shown, outermost = Shown(samples), _asked.get() is None
    cuda = samples.images.device.type == "cuda" and torch.cuda.is_initialized()
    token = _asked.set(asked)
    try:
        with torch.no_grad():
            before = ProcessState(asked.reward, cuda=cuda) if outermost else None
            try:
                with watched(asked, len(samples)) if outermost else nullcontext():
                    yield shown.samples
            except RunStopped:
                raise
            except StopIteration as error:  # as a cause, contextlib would take it for one that it raised itself
                raise _raised(asked, error, len(samples)) from None
            except Exception as error:
                raise _raised(asked, error, len(samples)) from error
            except SystemExit as error:
                if type(error) is not SystemExit:  # a signal's, by whoever asked for the run to end
                    raise
                raise _raised(asked, error, len(samples)) from error
            finally:
                for what in before.restore() if before is not None else ():
                    _warn_of(asked, what)
    finally:
        _asked.reset(token)
    if changed := shown.changed():
        raise ContractBroken(
            f"Reward '{asked.name}' changed the {' and '.join(changed)} that it was given ({asked.where}). Expected: "
            "the samples stay as they are, because others score and train on them. Change a copy, such as "
            "`samples.images.clone()`."
        )


def _warn_of(asked: Asked, what: str) -> None:
    if what.startswith("drew"):
        effect = (
            "The run's own draws are unchanged. The reward's continue from call to call and start over when the run "
            "resumes: give it a generator of its own."
        )
    else:
        effect = "It was set back: the whole run shares it. Restore what the reward changes before it returns."
    warnings.warn(f"Reward '{asked.name}' {what} ({asked.where}). {effect}", stacklevel=2)


def _accepted(asked: Asked, value: Any, count: int, *, infinities: bool = False) -> Received:
    try:
        scores = as_scores(value, count)
    except Unacceptable as error:
        raise asked.broken(error.received, count, error.advice) from None
    if (dtype := coarse(value)) is not None:
        warnings.warn(
            f"Reward '{asked.name}' returned scores of {dtype} ({asked.where}). Expected float32: close scores become "
            "equal in fewer digits. Compute the score in float32.",
            stacklevel=3,
        )
    return Received(asked=asked, scores=scores, infinities=infinities)


def _raised(asked: Asked, error: BaseException, count: int) -> ScoringRaised:
    frames = list(traceback.walk_tb(error.__traceback__))
    place = standing(asked.reward, [(frame, line) for frame, line in frames if frame.f_code.co_filename != __file__])
    if isinstance(error, SystemExit):
        said = f"tried to end the process with status {error.code!r}"
    else:
        said = f"raised {type(error).__name__}: {error}".rstrip(": ")
    return ScoringRaised(
        f"Reward '{asked.name}' {said}{place}, while it scored {count} samples ({asked.where}). Expected scores, NaN "
        "where a sample cannot be scored."
    )


# --------------------------------------------------------------- futures


def _checked_later(asked: Asked, inner: Future[Any], count: int) -> Future[Tensor]:
    outer: Future[Tensor] = Future()
    done, start = watch(asked, count, thread=None), time.monotonic()

    def finish(_: Future[Any]) -> None:
        done.set()
        took(asked, time.monotonic() - start)
        if inner.cancelled():
            outer.cancel()
        if not outer.set_running_or_notify_cancel():
            return
        try:
            outer.set_result(_accepted(asked, inner.result(), count).result())
        except (RunStopped, CancelledError) as error:
            outer.set_exception(error)
        except Exception as error:
            told = _raised(asked, error, count)
            told.__cause__ = error
            outer.set_exception(told)

    def give_up(_: Future[Tensor]) -> None:
        if outer.cancelled():
            inner.cancel()

    outer.add_done_callback(give_up)
    inner.add_done_callback(finish)
    return outer
