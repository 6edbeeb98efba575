"""`python -m flow_rl.evaluation.voting --left DIR --right DIR`: a local page for votes between two models.

Each page shows one prompt and two images without names. The order of the two is drawn anew for every battle and stays
when the page is loaded again. Votes are appended to a JSON Lines file that `flow_rl.evaluation.battles.read_battles`
reads. A battle with a vote is not shown again, so voting can be interrupted.

The pages know neither names nor paths nor prompt ids: battles have keyed names that only the server can resolve.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from flow_rl.evaluation.ballot import VOTES, Ballot, check_votes_file
from flow_rl.evaluation.pages import environment
from flow_rl.evaluation.vote_files import named_directory, read_sources
from flow_rl.rewards.bodies import announced_bytes, read_body
from flow_rl.rewards.connections import ConnectionLimits, server_of
from flow_rl.rewards.web import SameSite

_MAX_BODY = 1000
_FORM = "application/x-www-form-urlencoded"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Frame-Options": "DENY",  # a page of another site must not lie over our buttons
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


def build_app(ballot: Ballot, host: str = "127.0.0.1") -> FastAPI:
    """The voting page as an application.

    Args:
        ballot: what to vote on.
        host: the address it is served at. Requests that name another host are refused, so that a foreign web site
            cannot vote by pointing its own name at this machine (DNS rebinding).
    """
    template = environment().get_template("voting.html.j2")
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(SameSite, hosts={host, "localhost", "127.0.0.1"})

    @app.middleware("http")
    async def _harden(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        battles = ballot.open()
        if not battles:
            return template.render(token=None, votes=ballot.voted)
        token = battles[0]
        return template.render(
            token=token,
            prompt=ballot.prompt(token),
            left=len(battles),
            source=ballot.has_source(token),
            choices=VOTES,
        )

    @app.get("/image/{token}/{side}")
    def image(token: str, side: str) -> Response:
        try:
            content, kind = ballot.image(token, side)
        except (KeyError, ValueError):
            raise HTTPException(404) from None
        return Response(content, media_type=kind)

    @app.post("/vote")
    async def vote(request: Request) -> Response:
        battle, choice = await _read_vote(request)
        try:
            await asyncio.to_thread(ballot.vote, battle, choice)
        except KeyError:
            raise HTTPException(400, "No such battle or choice.") from None
        except OSError as error:
            print(f"error: a vote was not written: {error}", file=sys.stderr, flush=True)
            raise HTTPException(507, "The vote could not be written and does not count.") from None
        return RedirectResponse("/", status_code=303)  # so that loading the page again does not vote again

    return app


async def _read_vote(request: Request) -> tuple[str, str]:
    """Names of the battle and of the choice, each given once.

    Raises:
        HTTPException: 413 too long, 415 no form, 400 anything else.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise HTTPException(415, f"Expected a form ({_FORM}).")
    await announced_bytes(request, _MAX_BODY)
    form = parse_qs((await read_body(request, _MAX_BODY)).decode("utf-8", "replace"), keep_blank_values=True)
    if sorted(form) != ["battle", "vote"] or any(len(values) != 1 for values in form.values()):
        raise HTTPException(400, "Expected one battle and one vote.")
    return form["battle"][0], form["vote"][0]


class VotingServer:
    """Serves the page; a context manager that closes its socket.

    Args:
        ballot: what to vote on.
        port: to listen on; 0 takes a free one, and `server_port` says which.
        host: address to listen on. The default is reached from this machine alone.
    """

    def __init__(self, ballot: Ballot, port: int, host: str = "127.0.0.1") -> None:
        self._socket = socket.create_server((host, port))
        self.server_port: int = self._socket.getsockname()[1]
        limits = ConnectionLimits(connections=64)
        self._server = server_of(build_app(ballot, host), limits, log_level="error", timeout_graceful_shutdown=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def serve_forever(self) -> None:
        """Serve until `shutdown`, SIGINT or SIGTERM."""
        self._server.run(sockets=[self._socket])

    def shutdown(self) -> None:
        """Make `serve_forever` return."""
        self._server.should_exit = True


def main(args: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description="A local page on which people vote between two models' images.")
    parser.add_argument("--left", type=named_directory, required=True, metavar="[NAME=]DIR", help="images of one model")
    parser.add_argument(
        "--right", type=named_directory, required=True, metavar="[NAME=]DIR", help="images of the other"
    )
    parser.add_argument("--votes", type=Path, default=Path("runs/votes.jsonl"), help="file that votes are appended to")
    parser.add_argument("--edits", type=Path, help="edit file, to show each edit's source image")
    parser.add_argument("--port", type=int, default=8765)
    given = parser.parse_args(args)
    try:
        if not 0 <= given.port < 2**16:
            raise ValueError(f"--port must be from 0 to {2**16 - 1}, received {given.port}.")
        check_votes_file(given.votes)
        sources = read_sources(given.edits) if given.edits else None
        ballot = Ballot(given.left, given.right, given.votes, sources=sources)
        ballot.check_images()
        server = VotingServer(ballot, given.port)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with server:
        print(f"Vote at http://127.0.0.1:{server.server_port} ({len(ballot.open())} battles). Ctrl-C ends.", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    print(f"\n{ballot.voted} votes in {given.votes}. Ratings: python -m flow_rl.evaluation.rate_battles {given.votes}")


if __name__ == "__main__":
    main()
