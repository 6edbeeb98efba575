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

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from flow_rl.rewards.base import Reward
from flow_rl.rewards.batching import DynamicBatcher, Sample
from flow_rl.rewards.contract import ContractBroken
from flow_rl.rewards.wire import PROTOCOL, Identity, ScoreRequest, ScoreResponse, decode_images, explain_validation
from flow_rl.suggestions import nearest

logger = logging.getLogger("uvicorn.error")

#: a body must have arrived by then: a connection that says nothing would keep its place for ever
BODY_TIMEOUT_S = 60.0
#: of a refused body, read and thrown away: a client that is still sending would not see the refusal otherwise
DRAIN_BYTES = 256 * 2**20
DRAIN_TIMEOUT_S = 10.0
#: longest message of an answer: what a client sent may be in it
QUOTED = 1000
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
    max_body_mib: float = 64.0
    """Largest body (413 above)."""
    max_megapixels: float = 64.0
    """Pixels of all images of a request together, in millions (400 above): what a small body can unpack to."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_requests", "max_body_mib", "max_megapixels"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, received {getattr(self, name)}.")
        if not 0 <= self.max_wait_ms < math.inf:
            raise ValueError(f"max_wait_ms must be 0 or more, received {self.max_wait_ms}.")


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
        self.batcher = DynamicBatcher(rewards, max_batch=settings.max_batch, max_wait_ms=settings.max_wait_ms)
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
                raise HTTPException(
                    503,
                    f"{self._active} requests are being served, which is the most (max_requests).",
                    {"Retry-After": str(RETRY_AFTER_S)},
                )
        except HTTPException:
            await _drain(request)
            raise
        self._active += 1
        try:
            return await self._score(request)
        finally:
            self._active -= 1

    async def _score(self, request: Request) -> JSONResponse:
        message = _parse(await _read_body(request, int(self.settings.max_body_mib * 2**20)))
        if message.reward not in self.rewards:
            hint = nearest(message.reward, self.rewards) or f" It has {', '.join(self.rewards)}."
            raise HTTPException(404, f"This service has no reward '{message.reward}'.{hint}")
        try:
            samples = await asyncio.to_thread(_decode, message, int(self.settings.max_megapixels * 1e6))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        try:
            scores = await _unless_gone(request, self.batcher.score(message.reward, samples))
        except HTTPException:
            raise
        except Exception as error:  # whatever a reward raises: the client must hear of it, and the service go on
            raise _answer_for(error, message.reward, len(samples)) from None
        identity = self.identities[message.reward]
        response = ScoreResponse(
            reward=message.reward,
            version=identity.version,
            rubric_hash=identity.rubric_hash,
            scores=[None if math.isnan(score) else score for score in scores],
        )
        return JSONResponse(response.model_dump())

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._token is None:
            return
        # Bytes: compare_digest takes no text beyond ASCII, and a header may hold any.
        if not secrets.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise HTTPException(401, "Wrong or missing token.", {"WWW-Authenticate": "Bearer"})


def build_app(rewards: Mapping[str, Reward], settings: ServiceSettings, token: str | None = None) -> FastAPI:
    """Build the application.

    Args:
        rewards: by the name that requests use.
        settings: limits.
        token: what `Authorization: Bearer` must carry; None lets everyone ask.

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
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/version", service.version, methods=["GET"], response_model=None)
    app.add_api_route("/score", service.score, methods=["POST"], response_model=None)
    return app


def _parse(body: bytes) -> ScoreRequest:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(400, explain_validation(error)) from None


def _decode(message: ScoreRequest, max_pixels: int) -> list[Sample]:
    images = decode_images(message.images, max_pixels=max_pixels)
    left = max_pixels - sum(image.shape[1] * image.shape[2] for image in images)
    sources = decode_images(message.sources, max_pixels=left, field="sources") if message.sources else None
    return [
        Sample(image=image, prompt=prompt, category=category, source=sources[i] if sources else None)
        for i, (image, prompt, category) in enumerate(zip(images, message.prompts, message.categories, strict=True))
    ]


def _answer_for(error: Exception, reward: str, count: int) -> HTTPException:
    """The answer for what scoring raised; a client tries again after 500 and after nothing else."""
    cause = error.__cause__
    if isinstance(cause, ValueError):  # samples that are none of the reward's, such as edits without a source
        return HTTPException(400, f"Reward '{reward}' refuses these samples: {cause}"[:QUOTED])
    logger.error("Scoring a batch of %d failed: %s", count, error, exc_info=cause)
    status = 422 if isinstance(error, ContractBroken) else 500
    return HTTPException(status, f"Scoring failed: {error}"[:QUOTED])


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, if it is not larger than `limit` bytes, whatever its header says of its length."""
    too_large = HTTPException(413, f"The body is larger than {limit / 2**20:g} MiB: send fewer samples a request.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        await _drain(request)
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    break
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive in {BODY_TIMEOUT_S:g} s.") from None
    except ClientDisconnect:
        raise HTTPException(400, "The connection closed before the body was complete.") from None
    if len(body) > limit:
        await _drain(request)
        raise too_large
    return bytes(body)


async def _drain(request: Request) -> None:
    """Throw away what the client still sends, within bounds."""
    thrown = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            while thrown < DRAIN_BYTES:
                message = await request.receive()
                thrown += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


async def _unless_gone(request: Request, scoring: Awaitable[list[float]]) -> list[float]:
    """The scores, unless the client goes first: a client that gave up asks again, and must not be scored twice."""
    task = asyncio.ensure_future(scoring)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HTTPException(400, "The client closed the connection.")
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
