"""Servers on the loopback address: the real service, and ones that misbehave on purpose."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import uvicorn
from torch import Tensor

from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.connections import ConnectionLimits, server_of
from flow_rl.rewards.endpoint import EndpointSettings
from flow_rl.rewards.service import ServiceSettings, build_app

#: impatient, so that a test of a failure is over soon
QUICK = EndpointSettings(timeout_s=5.0, retries=2, backoff_s=0.01)


class Corner(Reward):
    """1 to 5 by the first pixel's red, minus half a point for each source pixel of full green: exact in float32."""

    version = "corner-1"

    def score(self, samples: Samples) -> Tensor:
        scores = 1 + 4 * samples.images[:, 0, 0, 0]
        return scores if samples.sources is None else (scores - 0.5 * samples.sources[:, 1, 0, 0]).clamp(1, 5)


class Gated(Reward):
    """Like `Corner`, and records what it was asked; waits for `gate` before it answers."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[str]] = []

    def score(self, samples: Samples) -> Tensor:
        self.batches.append(list(samples.prompts))
        self.entered.set()
        assert self.gate.wait(30)
        if any("raise" in prompt for prompt in samples.prompts):
            raise RuntimeError("CUDA is on fire")
        if any("refuse" in prompt for prompt in samples.prompts):
            raise ValueError("no source images")
        if any("short" in prompt for prompt in samples.prompts):
            return torch.ones(len(samples) + 1)
        scores = Corner().score(samples)
        scores[["nan" in prompt for prompt in samples.prompts]] = torch.nan
        return scores


def uint8_samples(count: int, *, size: tuple[int, int] = (6, 5), edit: bool = False, prompts=None) -> Samples:
    """Samples that have 8 bits a channel to begin with."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, 3, *size)
    images, sources = (torch.randint(0, 256, shape, generator=generator).float() / 255 for _ in range(2))
    return Samples(
        images=images,
        prompts=prompts or [f"prompt {i} – ü" for i in range(count)],
        categories=["plant"] * count,
        sources=sources if edit else None,
    )


@contextlib.contextmanager
def serving(
    rewards: dict[str, Reward],
    token: str | None = None,
    limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008
    **settings: float,
) -> Iterator[tuple[str, uvicorn.Server]]:
    """The real service, in a thread, on a free port."""
    app = build_app(rewards, ServiceSettings(**settings), token)
    server = server_of(app, limits, port=0, log_level="critical", timeout_graceful_shutdown=1)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@dataclass
class Script:
    """What a scripted server received, and what it answers: status, headers and body from number and request."""

    answer: Callable[[int, dict], tuple[int, dict[str, str], bytes]]
    requests: list[dict] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@contextlib.contextmanager
def scripted(answer: Callable[[int, dict], tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, Script]]:
    """A server that answers what it is told to; a content-length in the headers wins over the real one."""
    script, lock = Script(answer), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(script.requests)
                script.requests.append(body)
                script.headers.append({key.lower(): value for key, value in self.headers.items()})
                script.times.append(time.monotonic())
                script.paths.append(self.path)
            status, headers, content = script.answer(number, body)
            self.send_response(status)
            for key, value in ({"content-length": str(len(content))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            """Clients that gave up are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", script
    finally:
        server.shutdown()
        server.server_close()


def closed_port() -> str:
    """An address where nobody listens."""
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


def scores_body(scores: list, **changes: object) -> bytes:
    """What the service answers."""
    message = {"protocol": 1, "reward": "corner", "version": None, "rubric_hash": None, "scores": scores}
    return json.dumps(message | changes).encode()
