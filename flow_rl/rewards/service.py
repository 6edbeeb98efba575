"""The scoring service as a web application: who may ask, how much, and what is answered.

POST /score     a `wire.ScoreRequest` -> a `wire.ScoreResponse`
GET  /version   names, versions and rubric hashes of the rewards
GET  /health    open to everyone: queue and running batch, 503 if scoring has ended
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from flow_rl.rewards.base import Reward
from flow_rl.rewards.batching import DynamicBatcher, Sample
from flow_rl.rewards.bodies import Budget, announced_bytes, check_form, drain, read_body, refusal
from flow_rl.rewards.contract import ContractBroken
from flow_rl.rewards.web import RequestIds, SameSite
from flow_rl.rewards.wire import (
    PROTOCOL,
    QUOTED,
    REQUEST_ID_HEADER,
    Identity,
    ScoreRequest,
    ScoreResponse,
    check_pixels,
    count_pixels,
    decode_images,
    explain_validation,
)
from flow_rl.suggestions import nearest

logger = logging.getLogger("flow_rl.service")

T = TypeVar("T")
#: names of this machine
LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: what a client that was turned away should wait
RETRY_AFTER_S = 1


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Limits of the service."""

    max_batch: int = 32
    """Most samples that a reward scores at a time."""
    max_wait_ms: float = 10.0
    """How long a sample waits for company while the worker is idle."""
    max_requests: int = 64
    """Requests taken at a time, those waiting included; further ones are told to come back (503, Retry-After)."""
    max_samples: int = 1024
    """Samples of a request (400 above)."""
    max_body_mib: float = 64.0
    """Largest body (413 above)."""
    max_megapixels: float = 64.0
    """Pixels of all images of a request together, in millions (400 above): what a small body can unpack to. A batch
    holds no more either."""
    max_bodies_mib: float = 256.0
    """Bodies of all requests together; further ones wait. A body takes some three times its size while it is read."""
    max_megapixels_in_flight: float = 96.0
    """Pixels of all requests together, in millions; further ones wait. A pixel takes 3 bytes, 15 while it is scored,
    and what the reward itself needs."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "max_wait_ms" and not 0 < value < math.inf:
                raise ValueError(f"service.{name} must be above 0, received {value}.")
        for name, all_of_them in (("max_body_mib", "max_bodies_mib"), ("max_megapixels", "max_megapixels_in_flight")):
            if getattr(self, all_of_them) < getattr(self, name):
                raise ValueError(
                    f"service.{all_of_them} is {getattr(self, all_of_them):g}, less than one request may have "
                    f"(service.{name}, {getattr(self, name):g}): such a request would wait for ever. Raise it."
                )
        if not 0 <= self.max_wait_ms < math.inf:
            raise ValueError(f"service.max_wait_ms must be 0 or more, received {self.max_wait_ms}.")


class ScoringService:
    """Handlers of the three addresses.

    Args:
        rewards: by the name that requests use.
        settings: limits.
        token: what `Authorization: Bearer` must carry; None lets everyone ask.
    """

    def __init__(self, rewards: Mapping[str, Reward], settings: ServiceSettings, token: str | None) -> None:
        if not rewards:
            raise ValueError("rewards is empty: name at least one reward to serve.")
        self.rewards = rewards
        self.settings = settings
        self.identities = {name: Identity.of(reward) for name, reward in rewards.items()}
        self.max_body = int(settings.max_body_mib * 2**20)
        self.max_pixels = int(settings.max_megapixels * 1e6)
        self.bodies = Budget(int(settings.max_bodies_mib * 2**20))
        self.pixels = Budget(int(settings.max_megapixels_in_flight * 1e6))
        self.batcher = DynamicBatcher(
            rewards, max_batch=settings.max_batch, max_pixels=self.max_pixels, max_wait_ms=settings.max_wait_ms
        )
        self._token = token
        self._active = 0

    async def health(self) -> JSONResponse:
        """Say whether scoring goes on; `running_s` shows a reward that hangs."""
        state = {
            "status": "ok" if self.batcher.alive else "stopped",
            "requests": self._active,
            "queued": self.batcher.queued,
            "running_s": round(self.batcher.running_s, 3),
        }
        return JSONResponse(state, status_code=200 if self.batcher.alive else 503)

    async def version(self, request: Request) -> JSONResponse:
        """Say what is served."""
        self._authorise(request)
        rewards = {
            name: {"version": identity.version, "rubric_hash": identity.rubric_hash}
            for name, identity in self.identities.items()
        }
        return JSONResponse({"protocol": PROTOCOL, "rewards": rewards})

    async def score(self, request: Request) -> JSONResponse:
        """Score a batch.

        Raises:
            HTTPException: 400 bad request, 401 wrong token, 404 unknown reward, 408 body too slow, 413 body too
                large, 422 the reward returned no scores, 500 it raised, 503 too many requests.
        """
        try:
            self._authorise(request)
            if self._active >= self.settings.max_requests:
                raise refusal(
                    503,
                    f"{self._active} requests are being served, which is the most (max_requests).",
                    {"Retry-After": str(RETRY_AFTER_S)},
                )
        except HTTPException:
            await drain(request)
            raise
        self._active += 1
        try:
            return await self._score(request)
        finally:
            self._active -= 1

    async def _score(self, request: Request) -> JSONResponse:
        expected = await announced_bytes(request, self.max_body)
        async with self.bodies.share(expected):
            body = await read_body(request, expected)
            message = await asyncio.to_thread(_parse, body, self.settings.max_samples)
            del body
            return await _unless_gone(request, self._answer(request, message))

    async def _answer(self, request: Request, message: ScoreRequest) -> JSONResponse:
        self._check_name(message.reward)
        try:
            pixels = await asyncio.to_thread(_count_pixels, message, self.max_pixels)
            async with self.pixels.share(pixels):
                samples = await asyncio.to_thread(_decode, message, self.max_pixels)
                scores = await self.batcher.score(message.reward, samples)
        except _Unreadable as error:
            raise refusal(400, str(error)) from None
        except Exception as error:  # whatever a reward raises: the client must hear of it, and the service go on
            raise _answer_for(error, message, request.scope.get("request_id", "")) from None
        identity = self.identities[message.reward]
        response = ScoreResponse(
            reward=message.reward,
            version=identity.version,
            rubric_hash=identity.rubric_hash,
            scores=[None if math.isnan(score) else score for score in scores],
        )
        return JSONResponse(response.model_dump())

    def _check_name(self, name: str) -> None:
        if name not in self.rewards:
            hint = nearest(name, self.rewards) or f" It has {', '.join(self.rewards)}."
            raise refusal(404, f"This service has no reward {name[:QUOTED]!r}.{hint}")

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._token is None:
            return
        # Bytes: compare_digest takes no text beyond ASCII, and a header may hold any.
        if not secrets.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise refusal(401, "Wrong or missing token.", {"WWW-Authenticate": "Bearer"})


def build_app(
    rewards: Mapping[str, Reward], settings: ServiceSettings, token: str | None = None, host: str = "127.0.0.1"
) -> FastAPI:
    """Build the application.

    Args:
        rewards: by the name that requests use.
        settings: limits.
        token: what `Authorization: Bearer` must carry; None lets everyone ask who reaches the server by its own name.
        host: address that it is served at.

    Returns:
        the application; its `state.service` is the `ScoringService`.
    """
    service = ScoringService(rewards, settings, token)

    @contextlib.asynccontextmanager
    async def scoring(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    # No /docs: the body is read by hand, after the token and the limits, so nothing could be generated for it.
    app = FastAPI(title="Scoring service", lifespan=scoring, openapi_url=None)
    app.state.service = service
    if token is None:  # web sites that the user of this machine visits must not use it
        app.add_middleware(SameSite, hosts={host, *LOOPBACK})
    app.add_middleware(RequestIds, header=REQUEST_ID_HEADER)
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/version", service.version, methods=["GET"], response_model=None)
    app.add_api_route("/score", service.score, methods=["POST"], response_model=None)
    return app


class _Unreadable(ValueError):
    """A message, or an image of one, that cannot be read."""


def _parse(body: bytearray, max_samples: int) -> ScoreRequest:
    try:
        check_form(body, max_samples)
        message = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal(400, explain_validation(error)) from None
    except ValueError as error:
        raise refusal(400, str(error)) from None
    if len(message.images) > max_samples:
        raise refusal(
            400,
            f"images has {len(message.images)} entries, more than {max_samples} (max_samples of the service): send "
            "fewer samples at a time.",
        )
    return message


def _count_pixels(message: ScoreRequest, most: int) -> int:
    try:
        images = count_pixels(message.images)
        check_pixels(images, most)
        sources = count_pixels(message.sources, field="sources") if message.sources else 0
        check_pixels(images + sources, most, "images and sources")
    except ValueError as error:
        raise _Unreadable(str(error)) from None
    return images + sources


def _decode(message: ScoreRequest, most: int) -> list[Sample]:
    try:
        images = decode_images(message.images, max_pixels=most)
        sources = decode_images(message.sources, max_pixels=most, field="sources") if message.sources else None
    except ValueError as error:
        raise _Unreadable(str(error)) from None
    return [
        Sample(image=image, prompt=prompt, category=category, source=sources[i] if sources else None)
        for i, (image, prompt, category) in enumerate(zip(images, message.prompts, message.categories, strict=True))
    ]


def _answer_for(error: Exception, message: ScoreRequest, request_id: str) -> HTTPException:
    """The answer for what scoring raised; a client tries again after 500 and after nothing else."""
    cause = error.__cause__
    if isinstance(cause, ValueError):  # samples that are none of the reward's, such as edits without a source
        return refusal(400, f"Reward '{message.reward}' refuses these samples: {cause}")
    count = len(message.images)
    logger.error("Request %s: scoring %d samples failed: %s", request_id, count, error, exc_info=cause or error)
    return refusal(422 if isinstance(error, ContractBroken) else 500, f"Scoring failed: {error}")


async def _unless_gone(request: Request, scoring: Awaitable[T]) -> T:
    """The answer, unless the client goes first: a client that gave up asks again, and must not be scored twice."""
    task = asyncio.ensure_future(scoring)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise refusal(400, "The client closed the connection.")
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
