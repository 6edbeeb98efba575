"""What both our servers do around a request: refuse what a browser was tricked into, and number what is answered.

A server of this machine is reached by every web site that its user visits. Such a site can send forms, and with a name
of its own that points here (DNS rebinding) it can read answers, too. Browsers say who is asking in `Host` and `Origin`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: what a client may call its request
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: what browsers say of requests that a page of the server itself, or the user, made
OWN_SITE = ("same-origin", "none")


class SameSite:
    """Refuses requests that name another host, or that a page of another site sent.

    Args:
        app: what is asked otherwise.
        hosts: names and addresses that the server is known by, without a port.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the application, or refuse."""
        if scope["type"] == "http" and (why := self.fault(scope["method"], Headers(scope=scope))):
            await JSONResponse({"detail": why}, status_code=400)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def fault(self, method: str, headers: Headers) -> str | None:
        """What is wrong with a request's headers; None where nothing is."""
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            return f"Expected one Host header, received {len(hosts)}."
        if host_name(hosts[0]) not in self.hosts:
            return f"The request names the host {hosts[0][:100]!r}; this server is {', '.join(sorted(self.hosts))}."
        for origin in headers.getlist("origin"):
            if origin.partition("://")[2].lower() != hosts[0].lower():
                return f"The request comes from a page of {origin[:100]!r}."
        for site in headers.getlist("sec-fetch-site"):
            if site not in OWN_SITE and method not in ("GET", "HEAD"):  # a link to a page of ours may stand anywhere
                return f"The request comes from a page of another site ({site[:40]!r})."
        return None


def host_name(header: str) -> str | None:
    """The name in a Host header, in lower case and without its port; None for what is none."""
    if not re.fullmatch(r"[A-Za-z0-9.:\[\]_-]{1,255}", header):
        return None
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port  # raises where it is no number
    except ValueError:
        return None
    return parts.hostname


class RequestIds:
    """Gives every request an id, its own where it brings one, and every answer the id of its request.

    Args:
        app: what is asked.
        header: that holds the id. In the scope it is `request_id`.
    """

    def __init__(self, app: ASGIApp, header: str) -> None:
        self.app, self.header = app, header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(self.header, "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[self.header] = request_id
            await send(message)

        await self.app({**scope, "request_id": request_id}, receive, answer)
