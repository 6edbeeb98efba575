"""A fine-tuned reward model served by a standard engine: the readout from a chat endpoint's log-probabilities.

vLLM, SGLang and others answer `POST /v1/chat/completions` with the most likely tokens at every position. At the digit
after `Score: ` these hold what `readout.expected_score` reads from logits: `R = sum_s s p(s)` over the five digits,
renormalised (arXiv 2606.27608, section 2).

Shapes: N samples.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from typing_extensions import override

from flow_rl.rewards.base import Samples
from flow_rl.rewards.conversation import Question, messages
from flow_rl.rewards.endpoint import Endpoint, EndpointSettings
from flow_rl.rewards.faults import FaultPolicy, Unparseable
from flow_rl.rewards.http_reward import Batch, HttpReward
from flow_rl.rewards.readout import DIGITS, apply_cap
from flow_rl.rewards.rubrics import Rubric
from flow_rl.rewards.wire import encode_base64, explain_validation

#: the score line; "Score: 45", "Score: 4.5" and the like are no digit of the scale
_SCORE_LINE = re.compile(r"(?:^|\s)Score:[ \t]?([1-5])(?!\.?\d)")


class _Alternative(BaseModel):
    token: str
    logprob: float


class _Token(_Alternative):
    top_logprobs: list[_Alternative] = Field(default_factory=list)


class _LogProbs(BaseModel):
    content: list[_Token] | None = None


class _Choice(BaseModel):
    logprobs: _LogProbs | None = None


class _Completion(BaseModel):
    """The part of an answer that is read; engines add keys of their own."""

    model_config = ConfigDict(extra="ignore")

    choices: list[_Choice] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class Readout:
    """A score and where it came from.

    Attributes:
        score: expected value over the digits, in [1, 5].
        outside_mass: probability that was on none of the digits reported, in [0, 1].
        reasoning: what the model wrote before the score line.
    """

    score: float
    outside_mass: float
    reasoning: str


class OpenAIReward(HttpReward):
    """Asks a chat-completions endpoint to judge each sample by a rubric, one request a sample.

    Args:
        url: of the endpoint, up to and with ``/v1``.
        model: its name there.
        rubric: a shipped rubric's name, or the path of a YAML file: the one that the model was trained with.
        rubric_hash: what the rubric's hash must be, as the exported model states it; null does not check.
        token_variable: name of the environment variable that holds the token; null sends none.
        max_tokens: longest answer, reasoning included.
        top_logprobs: alternatives to ask for. Digits that are not among them count as impossible, so few alternatives
            bias a score towards the likely digits; 20 is the most that the protocol allows.
        max_outside: most probability on none of the digits; with more, the answer counts as unparseable.
        connection: time limits, retries, requests in flight.
        faults: how many samples may fail before the run stops.

    Raises:
        ValueError: a setting that cannot work.
    """

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str,
        rubric_hash: str | None = None,
        token_variable: str | None = None,
        max_tokens: int = 512,
        top_logprobs: int = 20,
        max_outside: float = 0.5,
        connection: EndpointSettings = EndpointSettings(),  # noqa: B008  (frozen)
        faults: FaultPolicy = FaultPolicy(),  # noqa: B008
    ) -> None:
        if not 5 <= top_logprobs <= 20:
            raise ValueError(f"top_logprobs must be from 5, one a digit, to 20; received {top_logprobs}.")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, received {max_tokens}.")
        if not 0 < max_outside <= 1:
            raise ValueError(f"max_outside must be above 0 and at most 1, received {max_outside}.")
        self.rubric = Rubric.load(rubric)
        if rubric_hash is not None and rubric_hash != self.rubric.hash:
            raise ValueError(
                f"Rubric '{rubric}' has the hash {self.rubric.hash}, and the model was trained with {rubric_hash}: "
                "take the rubric that was exported with the model."
            )
        endpoint = Endpoint(f"{url.rstrip('/')}/chat/completions", connection, token_variable)
        super().__init__(endpoint, self.rubric.name, 1, faults)
        self.model = model
        self.max_tokens = max_tokens
        self.top_logprobs = top_logprobs
        self.max_outside = max_outside
        self._outside: deque[float] = deque(maxlen=100_000)

    @property
    @override
    def judges_edits(self) -> bool:
        return self.rubric.task == "edit"

    @override
    def submit(self, samples: Samples) -> Future[Tensor]:
        """Begin to score a batch and return at once; see `AsyncReward.submit`.

        Raises:
            ValueError: a rubric for edits, and samples without sources.
        """
        if self.rubric.task == "edit" and samples.sources is None:
            raise ValueError(f"The rubric '{self.rubric.name}' judges edits, but the samples have no source images.")
        return super().submit(samples)

    @override
    async def ask(self, batch: Batch, indices: list[int], attempt: int) -> list[float]:
        """The score of one sample; see `HttpReward.ask`."""
        answer = await self.endpoint.post(partial(self._body, batch, indices[0], attempt))
        self.log.answered(answer.seconds, retries=answer.attempts - 1)
        try:
            completion = _Completion.model_validate_json(answer.body)
        except ValidationError as error:
            raise Unparseable(explain_validation(error)) from None
        logprobs = completion.choices[0].logprobs
        if logprobs is None or logprobs.content is None:
            raise self.endpoint.failure(
                "sent no log-probabilities, and a score is read from them: serve the model with an engine that "
                "supports `logprobs` and `top_logprobs` (vLLM: --max-logprobs 20)."
            )
        readout = read_score(logprobs.content)
        self._outside.append(readout.outside_mass)
        if readout.outside_mass > self.max_outside:
            raise Unparseable(f"{readout.outside_mass:.0%} of the probability was on none of the digits")
        rubric = self.rubric
        return [apply_cap(readout.score, readout.reasoning, phrase=rubric.cap_phrase, cap=rubric.cap_score)]

    @override
    def statistics(self) -> dict[str, float]:
        """As of every reward behind an address, and `outside_mass`, the mean probability off the digits."""
        masses = []
        while self._outside:
            masses.append(self._outside.popleft())
        own = {"outside_mass": sum(masses) / len(masses)} if masses else {}
        return super().statistics() | own

    def _body(self, batch: Batch, index: int, attempt: int) -> bytes:
        source = None if batch.sources is None else batch.sources[index]
        question = Question(rubric=self.rubric, prompt=batch.prompts[index], image=batch.images[index], source=source)
        body = {
            "model": self.model,
            "messages": chat(question),
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "seed": attempt,
            "logprobs": True,
            "top_logprobs": self.top_logprobs,
        }
        return json.dumps(body).encode()


def chat(question: Question) -> list[dict[str, Any]]:
    """The conversation that `VLMReward` has with the same model, with images as data URLs."""
    urls = [f"data:image/png;base64,{encode_base64(image)}" for image in question.images]
    turns = messages(question)
    for turn in turns:
        for i, piece in enumerate(turn["content"]):
            if piece["type"] == "image":
                turn["content"][i] = {"type": "image_url", "image_url": {"url": urls.pop(0)}}
    assert not urls, "a place in the conversation for every image"
    return turns


def read_score(tokens: Sequence[_Token]) -> Readout:
    """Read the first score line of an answer, as `reading.ScoreReader` does, which stops there.

    Args:
        tokens: of the answer, each with the most likely tokens at its place.

    Raises:
        Unparseable: no score line, a digit that is not a token by itself, or no usable probabilities.
    """
    text = "".join(token.token for token in tokens)
    match = _SCORE_LINE.search(text)
    if match is None:
        raise Unparseable(f"no line 'Score: <1..5>' in the answer, which ends '...{text[-60:]}'")
    position, start = match.start(1), 0
    for token in tokens:
        if start + len(token.token) > position:
            return _expected_value(token, reasoning=text[: match.start()])
        start += len(token.token)
    raise AssertionError("a match lies within its text")


def _expected_value(token: _Token, *, reasoning: str) -> Readout:
    """Expectation over the digits at the place of `token`, as `readout.expected_score` has it."""
    digit = token.token.strip()
    if digit not in DIGITS:
        raise Unparseable(f"the digit of the score line is part of the token {token.token!r}")
    # " 4" and "4" are different tokens: the distribution is over digits spelt as the one that was chosen.
    before, _, after = token.token.partition(digit)
    logprobs: Mapping[str, float] = {a.token: a.logprob for a in (token, *token.top_logprobs)}
    found = {int(d): logprobs[f"{before}{d}{after}"] for d in DIGITS if f"{before}{d}{after}" in logprobs}
    masses = {value: math.exp(logprob) for value, logprob in found.items() if not math.isnan(logprob) and logprob < 1}
    total = sum(masses.values())
    if len(masses) < len(found) or total <= 0:
        raise Unparseable(f"the log-probabilities of the digits are {found}")
    score = sum(value * mass for value, mass in masses.items()) / total
    return Readout(score=score, outside_mass=min(1.0, max(0.0, 1.0 - total)), reasoning=reasoning)
