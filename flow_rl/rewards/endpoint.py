"""One address of a service, asked with patience: time limits, retries that back off, errors that say what happened.

Retried: transport errors, 408, 429 and 5xx. Everything else that is not 200 ends at once, since asking again would
change nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpx

from flow_rl.rewards.client_pool import ClientPool
from flow_rl.rewards.faults import Refused, RewardFailure, Unreachable
from flow_rl.rewards.wire import REQUEST_ID_HEADER, read_token

#: longest wait between two attempts, whatever Retry-After says: a run must not sleep for an hour unnoticed
MAX_WAIT_S = 60.0
#: how much of an error's body a message quotes
QUOTED = 300
#: its own: a retry must not change what the run draws
_jitter = random.Random()
#: longest answer that is read
MAX_ANSWER_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """How a service is asked."""

    timeout_s: float = 120.0
    """Limit of one attempt, from the first byte sent to the last received, the service's queue included."""
    retries: int = 4
    """Further attempts after the first."""
    backoff_s: float = 0.5
    """Wait before the first retry; it doubles each time, up to a minute, and is spread by +-50 % so that many clients
    do not come back together. Retry-After, where the service sends it, sets the least wait."""
    max_in_flight: int = 8
    """Requests under way at a time."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "max_in_flight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, received {getattr(self, name)}.")
        for name in ("retries", "backoff_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, received {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A body that came with status 200.

    Attributes:
        body: what came.
        attempts: how many it took.
        seconds: from the first attempt to the end of the last, without the wait for a place among `max_in_flight`.
    """

    body: bytes
    attempts: int
    seconds: float


class Endpoint:
    """Posts JSON to one address. Belongs to one event loop at a time.

    Args:
        url: the address, http or https.
        settings: time limits and retries.
        token_variable: name of the environment variable that holds the token; None sends none. The token itself is
            never kept, so it is in no config, checkpoint or message.

    Raises:
        ValueError: a bad address, or a variable that is not set.
    """

    def __init__(self, url: str, settings: EndpointSettings, token_variable: str | None = None) -> None:
        self.url = check_url(url)
        self.settings = settings
        self.token_variable = token_variable
        read_token(token_variable)
        self._numbered = False
        self._client: ClientPool | None = None
        self._places: asyncio.Semaphore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_places": None, "_loop": None}

    async def post(self, make_body: Callable[[], bytes]) -> Answer:
        """Post a JSON body until it is answered.

        Args:
            make_body: called in a thread once there is a place for the request, so that no more than `max_in_flight`
                bodies are in memory.

        Raises:
            Unreachable: no attempt was answered.
            Refused: an answer that no further attempt would change.
        """
        client, places = self._open()
        async with places:
            body = await asyncio.to_thread(make_body)
            start = time.perf_counter()
            last: int | str
            for attempt in range(1, self.settings.retries + 2):
                try:
                    async with asyncio.timeout(self.settings.timeout_s):
                        status, headers, content = await self._send(client, body)
                except (TimeoutError, httpx.TimeoutException):
                    last, shown = "timeout", f"no answer within {self.settings.timeout_s:g} s"
                    least_wait = 0.0
                except httpx.RequestError as error:
                    last, shown = type(error).__name__, f"{type(error).__name__}: {error}".rstrip(": ")
                    least_wait = 0.0
                else:
                    if status == 200:
                        return Answer(body=content, attempts=attempt, seconds=time.perf_counter() - start)
                    last, shown = status, _quote(status, content)
                    if not _may_pass(status):
                        message = f"refused the request: {shown}{_advice(status, self.token_variable)}"
                        raise self.failure(message, attempts=attempt, last_status=status)
                    least_wait = min(_retry_after(headers.get("retry-after", "")), MAX_WAIT_S)
                if attempt <= self.settings.retries:
                    await asyncio.sleep(max(self._backoff(attempt), least_wait))
            message = f"gave no answer: {shown} (last of {attempt} attempts)."
            raise self.failure(message, Unreachable, attempts=attempt, last_status=last)

    async def close(self) -> None:
        """Close the connections; a later `post` opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def failure(
        self, message: str, kind: type[RewardFailure] = Refused, *, attempts: int = 1, last_status: int | str = 200
    ) -> RewardFailure:
        """An error of this address; status 200 is for answers that are wrong all the same."""
        return kind(f"{self.url} {message}", url=self.url, attempts=attempts, last_status=last_status)

    async def _send(self, client: ClientPool, body: bytes) -> tuple[int, httpx.Headers, bytes]:
        content = bytearray()
        request_id = uuid.uuid4().hex
        async with client.stream("POST", self.url, content=body, headers={REQUEST_ID_HEADER: request_id}) as response:
            self._check_id(request_id, response)
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    limit = f"{MAX_ANSWER_BYTES / 2**20:g} MiB"
                    message = f"sent more than {limit}, which no answer needs: is it a scoring service?"
                    raise self.failure(message, last_status=response.status_code)
        return response.status_code, response.headers, bytes(content)

    def _check_id(self, sent: str, response: httpx.Response) -> None:
        """Refuse the answer to another request: its scores are those of other images."""
        received = response.headers.get(REQUEST_ID_HEADER)
        if received is None and not (self._numbered and response.status_code == 200):
            return  # a service that numbers nothing, or whatever stands before it
        if received != sent:
            told = "without an id" if received is None else f"to request {received[:QUOTED]!r}"
            message = f"was sent request '{sent}' and sent the answer {told}: something between mixes up answers."
            raise self.failure(message, last_status=response.status_code)
        self._numbered = True

    def _open(self) -> tuple[ClientPool, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._client is None or self._places is None or self._loop is not loop:
            token = read_token(self.token_variable)
            headers = {"Content-Type": "application/json"}
            if token is not None:
                headers["Authorization"] = f"Bearer {token}"
            # The attempt as a whole is timed in `post`: httpx's limits start anew with every packet.
            # Plain http needs no certificates, and loading them takes a sixth of a second.
            verify = self.url.startswith("https:")
            self._client = ClientPool(self.settings.max_in_flight, headers=headers, timeout=None, verify=verify)
            self._places = asyncio.Semaphore(self.settings.max_in_flight)
            self._loop = loop
        return self._client, self._places

    def _backoff(self, attempt: int) -> float:
        return min(self.settings.backoff_s * 2 ** (attempt - 1), MAX_WAIT_S) * _jitter.uniform(0.5, 1.5)


def check_url(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: no http(s) address, or one with a password in it.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ValueError(f"url must look like http://host:port, received '{url}'.")
    if parts.username or parts.password:
        raise ValueError("url must not hold a password: put the token into an environment variable (token_variable).")
    return parts.geturl().rstrip("/")


def _may_pass(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _retry_after(value: str) -> float:
    """Seconds that the service asks to wait, given as a number or a date; 0 where it does not say."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (then - datetime.now(UTC)).total_seconds()) if then.tzinfo else 0.0


def _quote(status: int, content: bytes) -> str:
    """Status, its usual words, and the beginning of what the service says of it."""
    text = content.decode("utf-8", errors="replace")
    try:
        detail = json.loads(text)
    except ValueError:
        detail = text
    if isinstance(detail, dict) and "detail" in detail:
        detail = detail["detail"]
    words = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    return f"{status} {words}: {str(detail)[:QUOTED]}".rstrip(": ")


def _advice(status: int, token_variable: str | None) -> str:
    if status in (401, 403):
        where = f"in {token_variable}" if token_variable else "(token_variable is not set)"
        return f" Check the token {where}."
    if status == 413:
        return " Lower samples_per_request, or raise max_body_mib of the service."
    return ""
