"""Bodies of requests: how many may be in memory, and what they may unpack to, over all requests together.

A limit for each request is none for all of them: a budget is shared, and who finds it spent waits for its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

#: a body must have arrived by then: a connection that says nothing would keep its place for ever
BODY_TIMEOUT_S = 60.0
#: of a refused body, read and thrown away: a client that is still sending would not see the refusal otherwise
DRAIN_BYTES = 256 * 2**20
DRAIN_TIMEOUT_S = 10.0
#: texts beside those of the samples: keys, the reward's name
OTHER_TEXTS = 32
#: texts of a sample: image, source, prompt, category
TEXTS_A_SAMPLE = 4
#: bytes outside of the texts, such as brackets, commas and spaces; printed for people, a message has some ten a text
OUTSIDE_BYTES, OUTSIDE_BYTES_A_TEXT = 4096, 64
#: quotes and backslashes inside of the texts, a sample
ESCAPES_A_SAMPLE = 1000
#: longest message of an answer: what a client sent may be in it
MAX_DETAIL = 1000


def refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> HTTPException:
    """An answer that refuses; its message is bounded, whatever it repeats of the request."""
    if len(detail) > MAX_DETAIL:
        detail = f"{detail[: MAX_DETAIL - 4]} ..."
    return HTTPException(status, detail, headers)


class Budget:
    """An amount that requests share; who would exceed it waits, first come, first served.

    Args:
        total: at least as much as any request may take.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Event]] = deque()

    @contextlib.asynccontextmanager
    async def share(self, amount: int) -> AsyncIterator[None]:
        """Hold some of it for the time of the block."""
        await self._take(amount)
        try:
            yield
        finally:
            self.used -= amount
            self._next()

    async def _take(self, amount: int) -> None:
        if not self._waiting and self.used + amount <= self.total:
            self.used += amount
            return
        turn = (amount, asyncio.Event())
        self._waiting.append(turn)
        try:
            await turn[1].wait()
        except asyncio.CancelledError:
            if turn[1].is_set():  # it was this one's turn just now
                self.used -= amount
            else:
                self._waiting.remove(turn)
            self._next()
            raise

    def _next(self) -> None:
        while self._waiting and self.used + self._waiting[0][0] <= self.total:
            amount, turn = self._waiting.popleft()
            self.used += amount
            turn.set()


async def announced_bytes(request: Request, limit: int) -> int:
    """How long the body says it is; `limit` where it does not say.

    Raises:
        HTTPException: 413, longer than `limit`.
    """
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or "transfer-encoding" in request.headers:
        return limit
    if len(length) > 18 or int(length) > limit:
        await drain(request)
        raise _too_large(limit)
    return int(length)


async def read_body(request: Request, limit: int) -> bytearray:
    """The body, if it is not larger than `limit` bytes, whatever its header says of its length.

    Raises:
        HTTPException: 400 the client went, 408 it took too long, 413 it is too large.
    """
    body, received, more = bytearray(), 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more and received <= max(limit, DRAIN_BYTES):  # what is too much is thrown away, not left unread
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise refusal(400, "The connection closed before the body was complete.")
                received += len(message.get("body", b""))
                more = message.get("more_body", False)
                if received <= limit:
                    body += message.get("body", b"")
    if received > limit:
        raise _too_large(limit)
    if more:
        raise refusal(408, f"The body did not arrive in {BODY_TIMEOUT_S:g} s.")
    return body


async def drain(request: Request) -> None:
    """Throw away what the client still sends, within bounds."""
    thrown = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            while thrown < DRAIN_BYTES:
                message = await request.receive()
                thrown += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def _too_large(limit: int) -> HTTPException:
    return refusal(413, f"The body is larger than {limit / 2**20:g} MiB: send fewer samples a request.")


def check_form(body: bytearray, max_samples: int) -> None:
    """Refuse a body that cannot be a message, before a parser makes an object of each of its values.

    The JSON of n samples has about 4 n strings and little else. This finds the strings by their quotes, at the
    speed of a search, and counts what lies between.

    Args:
        body: JSON, or something else: what is wrong otherwise is for the parser to say.
        max_samples: of a request.

    Raises:
        ValueError: more texts, escapes or other bytes than so many samples can have.
    """
    texts = outside = escapes = 0
    most_texts = TEXTS_A_SAMPLE * max_samples + OTHER_TEXTS
    place = 0
    while (begin := body.find(b'"', place)) != -1:
        outside += begin - place
        texts += 1
        end = begin
        while True:
            start, end = end + 1, body.find(b'"', end + 1)
            if end == -1:
                return  # a text without end, which the parser names
            part = body[start:end]
            if (len(part) - len(part.rstrip(b"\\"))) % 2 == 0:
                break
            escapes += 1
            if escapes > ESCAPES_A_SAMPLE * max_samples:
                raise ValueError(f"The message has more than {escapes - 1} escaped quotes.")
        place = end + 1
        if texts > most_texts:
            raise ValueError(
                f"The message has more texts than {max_samples} samples need, which is the most a request may hold: "
                "send fewer samples at a time, or raise max_samples of the service."
            )
        _check_outside(outside, texts)
    _check_outside(outside + len(body) - place, texts)


def _check_outside(outside: int, texts: int) -> None:
    if outside > OUTSIDE_BYTES + OUTSIDE_BYTES_A_TEXT * texts:
        raise ValueError(
            f"The message has {outside} bytes or more outside of its {texts} texts: expected images, prompts and "
            "categories as lists of texts, one a sample."
        )
