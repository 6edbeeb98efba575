"""Connections to our servers: how many, how long they may say nothing, and how much they can make a log grow.

uvicorn knows one of these limits, how long a connection may idle after an answer. A connection that never finishes its
first request would stay for ever, until the process has no descriptor left for anyone else.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import uvicorn
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

#: loggers whose records a stranger can cause
LOGGERS = ("uvicorn.error", "uvicorn", "asyncio", "flow_rl.service")


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What a connection may do without a token."""

    header_s: float = 10.0
    """Time for a request's line and headers, from the connection's beginning or the first byte after an answer."""
    idle_s: float = 30.0
    """Time without a request after an answer. Longer than the five seconds that httpx keeps an idle connection: the
    client should be the one to close it."""
    write_s: float = 30.0
    """Time that a client may take no byte of an answer."""
    header_bytes: int = 16 * 1024
    """Size of a request's line and headers."""
    connections: int = 0
    """Most connections; 0 takes what the process's limit on descriptors leaves, at most 4096. Beyond it, the connection
    that has been silent for longest gives way."""

    @property
    def backlog(self) -> int:
        """Connections that are taken in one go. They must fit beside those that are open."""
        return min(128, _descriptors() // 4)

    @property
    def most(self) -> int:
        """`connections`, or what 0 stands for."""
        # Some descriptors for files, pipes and libraries.
        return self.connections or min(4096, max(16, _descriptors() - self.backlog - 48))


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if soft == resource.RLIM_INFINITY else int(soft)


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, with the limits of `ConnectionLimits`."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answers = 0
        self.since = self.loop.time()
        self._receiving = True
        self._timer: asyncio.TimerHandle | None = None
        self._unwritten, self._written_at = 0, self.since

    @property
    def busy(self) -> bool:
        """Whether a request is being served."""
        return self.cycle is not None and not self.cycle.response_complete

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again()
        if len(self.connections) > self.limits.most:
            silent = [c for c in self.connections if isinstance(c, BoundedProtocol) and not c.busy and c is not self]
            # Those that have been answered before belong to clients, more likely than not.
            longest = min(silent, key=lambda c: (c.answers > 0, c.since), default=self)
            longest._close()

    @override
    def data_received(self, data: bytes) -> None:
        if not self.busy and not self._receiving:
            self._receiving, self.since = True, self.loop.time()
        super().data_received(data)

    @override
    def on_response_complete(self) -> None:
        self.answers += 1
        self._receiving, self.since = False, self.loop.time()
        super().on_response_complete()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _close(self) -> None:
        self.connections.discard(self)
        self.transport.abort()  # `close` would wait until the client has taken what is still unwritten

    def _look_again(self) -> None:
        """Close the connection if its time is over, and else set a timer for when it may be."""
        now = self.loop.time()
        unwritten = self.transport.get_write_buffer_size()
        if unwritten == 0 or unwritten != self._unwritten:
            self._unwritten, self._written_at = unwritten, now
        late_header = not self.busy and self._receiving and now - self.since >= self.limits.header_s
        late_reader = unwritten > 0 and now - self._written_at >= self.limits.write_s
        if late_header or late_reader:
            self._close()
            return
        waits_for_header = not self.busy and self._receiving
        wait = self.since + self.limits.header_s - now if waits_for_header else self.limits.header_s / 4
        self._timer = self.loop.call_later(max(wait, 0.01), self._look_again)


class Throttle(logging.Filter):
    """Lets a number of records of a kind through in a while, and then says how many were left out.

    Args:
        records: of one text, before its arguments are filled in, in a while.
        seconds: a while.
        length: most characters of a record's message.
    """

    def __init__(self, *, records: int = 10, seconds: float = 60.0, length: int = 4000) -> None:
        super().__init__()
        self.records, self.seconds, self.length = records, seconds, length
        self._began: dict[str, float] = {}
        self._count: defaultdict[str, int] = defaultdict(int)

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        now, kind = time.monotonic(), str(record.msg)[:80]
        message = record.getMessage()
        if len(message) > self.length:
            record.msg, record.args = f"{message[: self.length]} ...", None
        if now - self._began.setdefault(kind, now) >= self.seconds:
            left_out = self._count[kind] - self.records
            self._began[kind], self._count[kind] = now, 0
            if left_out > 0:
                record.msg, record.args = f"{record.getMessage()} ({left_out} more like it were left out)", None
        self._count[kind] += 1
        if len(self._count) > 1000:  # kinds are few: somebody writes messages of their own
            self._began.clear()
            self._count.clear()
        return self._count[kind] <= self.records


def server_of(app: Any, limits: ConnectionLimits = ConnectionLimits(), **settings: Any) -> uvicorn.Server:
    """Uvicorn around an application, with limits for its connections and its log.

    Args:
        app: the ASGI application.
        limits: of connections.
        **settings: further ones of `uvicorn.Config`.
    """
    protocol = type("Protocol", (BoundedProtocol,), {"limits": limits})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=limits.backlog,
        timeout_keep_alive=limits.idle_s,  # type: ignore[arg-type]  # seconds, and fractions work
        h11_max_incomplete_event_size=limits.header_bytes,
        **settings,
    )
    for name in LOGGERS:
        found = logging.getLogger(name)
        if not any(isinstance(entry, Throttle) for entry in found.filters):
            found.addFilter(Throttle())
    return uvicorn.Server(config)
