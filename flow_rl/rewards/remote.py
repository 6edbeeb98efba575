"""A reward that a scoring service computes: `python -m cli.reward_server` on another machine.

Shapes: N samples.
"""

from __future__ import annotations

import math
from functools import partial

from pydantic import ValidationError
from typing_extensions import override

from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN
from flow_rl.rewards.contract import TOLERANCE
from flow_rl.rewards.endpoint import Endpoint, EndpointSettings
from flow_rl.rewards.faults import FaultPolicy, Unparseable
from flow_rl.rewards.http_reward import Batch, HttpReward
from flow_rl.rewards.wire import Identity, ScoreRequest, ScoreResponse, encode_base64, explain_validation


class RemoteReward(HttpReward):
    """Asks a scoring service, many requests at a time.

    Who answers is pinned: once a batch has been scored, another version or rubric hash stops the run, because scores
    of two scorers are not on one scale.

    Args:
        url: of the service, like ``http://gpu-7:8000``.
        reward: its name there.
        token_variable: name of the environment variable that holds the service's token; null sends none.
        samples_per_request: most samples of one request. The service merges requests into its own batches.
        version: what the service must say of the reward's version; null takes what it says first.
        rubric_hash: hash of the rubric that it must score by; null takes what it says first.
        connection: time limits, retries, requests in flight.
        faults: how many samples may fail before the run stops.

    Raises:
        ValueError: a setting that cannot work.
    """

    def __init__(
        self,
        url: str,
        reward: str,
        token_variable: str | None = None,
        samples_per_request: int = 8,
        version: str | None = None,
        rubric_hash: str | None = None,
        connection: EndpointSettings = EndpointSettings(),  # noqa: B008  (frozen)
        faults: FaultPolicy = FaultPolicy(),  # noqa: B008
    ) -> None:
        if not reward:
            raise ValueError("reward is empty: give the name that the service knows it by (GET /version lists them).")
        endpoint = Endpoint(f"{url.rstrip('/')}/score", connection, token_variable)
        super().__init__(endpoint, reward, samples_per_request, faults)
        self.reward = reward
        self.expected = Identity(version=version, rubric_hash=rubric_hash)
        self._pinned: Identity | None = None

    @override
    async def ask(self, batch: Batch, indices: list[int], attempt: int) -> list[float]:
        """Scores of some samples from one request; see `HttpReward.ask`."""
        answer = await self.endpoint.post(partial(self._body, batch, indices))
        self.log.answered(answer.seconds, retries=answer.attempts - 1)
        try:
            response = ScoreResponse.model_validate_json(answer.body)
        except ValidationError as error:
            if error.errors()[0]["type"] == "json_invalid":
                raise Unparseable(explain_validation(error)) from None
            message = f"sent no answer of a scoring service: {explain_validation(error)}"
            raise self.endpoint.failure(message) from None
        self._check_identity(response)
        if len(response.scores) != len(indices):
            raise self.endpoint.failure(f"sent {len(response.scores)} scores for {len(indices)} samples.")
        scores = [math.nan if score is None else score for score in response.scores]
        for score in scores:
            # Infinities pass here: they are no number off the scale but a sample that could not be scored.
            if math.isfinite(score) and not SCORE_MIN - TOLERANCE <= score <= SCORE_MAX + TOLERANCE:
                message = f"sent the score {score:g} for '{self.reward}'; the scale is {SCORE_MIN:g} to {SCORE_MAX:g}."
                raise self.endpoint.failure(message)
        return scores

    def _body(self, batch: Batch, indices: list[int]) -> bytes:
        sources = batch.sources
        return (
            ScoreRequest(
                reward=self.reward,
                images=[encode_base64(batch.images[i]) for i in indices],
                prompts=[batch.prompts[i] for i in indices],
                categories=[batch.categories[i] for i in indices],
                sources=None if sources is None else [encode_base64(sources[i]) for i in indices],
            )
            .model_dump_json()
            .encode()
        )

    def _check_identity(self, response: ScoreResponse) -> None:
        """Refuse scores of another reward, version or rubric than expected, or than at first."""
        if response.reward != self.reward:
            raise self.endpoint.failure(f"was asked for reward '{self.reward}' and sent scores of '{response.reward}'.")
        received = Identity(version=response.version, rubric_hash=response.rubric_hash)
        pinned = self._pinned or received
        for key in ("version", "rubric_hash"):
            told, first, now = (getattr(who, key) for who in (self.expected, pinned, received))
            if told is not None and now != told:
                raise self.endpoint.failure(f"scores with {key} {now!r}, and the config asks for {told!r}.")
            if now != first:
                raise self.endpoint.failure(
                    f"changed its {key} from {first!r} to {now!r} during the run: scores of both are not on one scale."
                )
        self._pinned = pinned
