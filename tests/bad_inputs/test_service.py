"""What clients, browsers and strangers send to the scoring service, and what they are told."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cli import reward_server
from flow_rl.rewards.bodies import Budget, check_form
from flow_rl.rewards.client_pool import POOL, ClientPool
from flow_rl.rewards.connections import ConnectionLimits, Throttle
from flow_rl.rewards.faults import Refused
from flow_rl.rewards.png import read_header, read_pixels
from flow_rl.rewards.remote import RemoteReward
from flow_rl.rewards.service import ServiceSettings, build_app
from flow_rl.rewards.wire import REQUEST_ID_HEADER, decode_images
from tests.bad_inputs.pictures import chunk, header, png, with_chunk
from tests.flow_rl.rewards.loopback import QUICK, Corner, Gated, scores_body, scripted, serving, uint8_samples


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


BOMB = zlib.compress(b"A" * 3 * 2**20)
GOOD = b64(png())


def message(**changes: Any) -> dict[str, Any]:
    fields = {"protocol": 1, "reward": "corner", "images": [GOOD], "prompts": ["p"], "categories": ["c"]}
    return {key: value for key, value in (fields | changes).items() if value is not ...}


def raw(**changes: Any) -> bytes:
    return json.dumps(message(**changes)).encode()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    settings = ServiceSettings(max_megapixels=1, max_samples=8, max_body_mib=1)
    with TestClient(build_app({"corner": Corner(), "gated": Gated()}, settings), base_url="http://localhost") as found:
        yield found


#: body, status and words of the answer
BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "Invalid JSON"),
    "no JSON": (b"hello", 400, "Invalid JSON"),
    "a pickle": (b"\x80\x04K\x01.", 400, "Invalid JSON"),
    "cut off": (raw()[:-5], 400, "Invalid JSON"),
    "a text without end": (b'{"reward": "x', 400, "Invalid JSON"),
    "not UTF-8": (raw().replace(b'"p"', b'"\xff"'), 400, "unicode"),
    "half an emoji": (raw().replace(b'"p"', b'"\\ud83d"'), 400, "surrogate|hex escape"),
    "a list": (b"[]", 400, "object"),
    "deep": (b"[" * 3000 + b"]" * 3000, 400, "recursion limit|outside of its 0 texts"),
    "many integers": (b'{"images":[' + b"1," * 200_000 + b"1]}", 400, "bytes or more outside of its 1 texts"),
    "many nulls": (b'{"prompts":[' + b"null," * 100_000 + b"1]}", 400, "outside of its 1 texts"),
    "many texts": (b'{"images":[' + b'"",' * 100_000 + b'""]}', 400, "more texts than 8 samples need"),
    "many quotes": (b'{"reward":"' + b'\\"' * 20_000 + b'"}', 400, "more than 8000 escaped quotes"),
    "a long number": (b'{"protocol":' + b"9" * 100_000 + b"}", 400, "outside of its 1 texts"),
    "many samples": (raw(images=[GOOD] * 9, prompts=["p"] * 9, categories=["c"] * 9), 400, "9 entries, more than 8"),
    "a long name": (raw(reward="x" * 500_000), 400, "at most 256 characters, received 'xxx"),
    "a long key": (raw(**{"k" * 500_000: 1}), 400, "k: Extra inputs"),
    "an unknown reward": (raw(reward="korner"), 404, "no reward 'korner'. Did you mean 'corner'"),
    "a name before its images": (raw(reward="other", images=["%"]), 404, "no reward 'other'"),
    "no reward": (raw(reward=...), 400, "reward: Field required"),
    "a number as a name": (raw(reward=3), 400, "reward: .*string, received 3"),
    "another protocol": (raw(protocol=2), 400, "received protocol 2, this side speaks 1"),
    "a huge protocol": (raw(protocol=10**300), 400, "protocol"),
    "a text as protocol": (raw(protocol="1"), 400, "protocol: .*integer, received '1'"),
    "prompts that are none": (raw(prompts=[1] * 8), 400, r"prompts\.0: .*string, received 1\.$"),
    "fewer prompts": (raw(prompts=[]), 400, "as many entries of each kind"),
    "fewer sources": (raw(sources=[]), 400, "as many entries of each kind"),
    "one prompt as a text": (raw(prompts="p"), 400, "prompts: .*array, received 'p'"),
    "another key": (raw(pickle="gASV"), 400, "pickle: Extra inputs"),
    "no base64": (raw(images=["%%%"]), 400, r"images\[0\] is not base64"),
    "no base64 at the end": (raw(images=[GOOD + "%"]), 400, r"images\[0\] is not base64"),
    "no ASCII": (raw(images=["ü" * 50]), 400, r"images\[0\] is not base64"),
    "a data URL": (raw(images=["data:image/png;base64," + GOOD]), 400, "before the comma of a data URL"),
    "an empty image": (raw(images=[""]), 400, r"images\[0\] is not a PNG: it begins with nothing"),
    "a GIF": (raw(images=[b64(b"GIF89a" + bytes(40))]), 400, "not a PNG: it begins with 47 49 46"),
    "a cut header": (raw(images=[b64(png()[:20])]), 400, "its header is missing or cut off"),
    "a cut picture": (raw(images=[b64(png()[:45])]), 400, r"images\[0\] is damaged"),
    "no pixels": (raw(images=[b64(header(2, 2) + chunk(b"IEND", b""))]), 400, r"images\[0\] is damaged"),
    "a wrong checksum": (raw(images=[b64(png()[:30] + b"xxx" + png()[33:])]), 400, "is damaged|can be read"),
    "RGBA": (raw(images=[b64(png("RGBA"))]), 400, "mode 'RGBA' with 8 bits"),
    "grey": (raw(images=[b64(png("L"))]), 400, "mode 'L' with 8 bits"),
    "a palette": (raw(images=[b64(png("P"))]), 400, "received mode 'P'"),
    "16 bits": (raw(images=[b64(header(2, 2, 16))]), 400, "mode 'RGB' with 16 bits"),
    "no width": (raw(images=[b64(header(0, 2))]), 400, "0 x 2 pixels"),
    "too many pixels": (raw(images=[b64(header(2000, 1000))]), 400, "more than 1000000 pixels.*2000000 received"),
    "the most pixels": (raw(images=[b64(header(2**31 - 1, 2**31 - 1))]), 400, "more than 1000000 pixels"),
    "together": (raw(images=[b64(header(900, 900))], sources=[b64(header(900, 900))]), 400, "images and sources"),
    "a bomb of text": (raw(images=[b64(with_chunk(b"zTXt", b"a\0\0" + BOMB))]), 400, "zTXt chunk .*more than 1 MiB"),
    "a bomb of words": (raw(images=[b64(with_chunk(b"iTXt", b"a\0\1\0en\0b\0" + BOMB))]), 400, "iTXt chunk .*1 MiB"),
    "a bomb of colours": (raw(images=[b64(with_chunk(b"iCCP", b"a\0\0" + BOMB))]), 400, "iCCP chunk .*1 MiB"),
    "a large body": (b" " * (2**20 + 1), 413, "larger than 1 MiB"),
    "a reward that fails": (raw(reward="gated", prompts=["raise"]), 500, "'gated' raised RuntimeError: CUDA is"),
    "a reward that breaks off": (raw(reward="gated", prompts=["short"]), 422, r"'gated' returned shape \(2,\)"),
    "a reward that refuses": (raw(reward="gated", prompts=["refuse"]), 400, "refuses these samples: no source"),
}  # fmt: skip


@pytest.mark.parametrize("body, status, words", BODIES.values(), ids=BODIES.keys())  # noqa: PT006
def test_bad_requests_are_explained_in_few_words(client: TestClient, body: bytes, status: int, words: str) -> None:
    answer = client.post("/score", content=body)
    assert answer.status_code == status, answer.text[:300]
    assert re.search(words, answer.json()["detail"]), answer.text[:300]
    assert len(answer.content) < 1200
    assert client.post("/score", json=message()).json()["scores"] == [1.0]  # and the service still answers


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Host": "evil.example"}, "names the host 'evil.example'"),
        ({"Host": "localhost.evil.example:8000"}, "names the host"),
        ({"Host": "localhost@evil.example"}, "names the host"),
        ({"Host": ""}, "names the host ''"),
        ({"Origin": "http://evil.example"}, "comes from a page of 'http://evil.example'"),
        ({"Origin": "null"}, "comes from a page of 'null'"),
        ({"Origin": "http://localhost:3000"}, "comes from a page of"),
        ({"Sec-Fetch-Site": "cross-site"}, "another site"),
    ],
)
def test_without_a_token_no_web_site_can_use_the_service(client: TestClient, headers: dict, words: str) -> None:
    answer = client.post("/score", json=message(), headers=headers)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_batch": 0}, "service.max_batch must be above 0, received 0"),
        ({"max_requests": -1}, "service.max_requests must be above 0"),
        ({"max_samples": 0}, "service.max_samples must be above 0"),
        ({"max_body_mib": float("nan")}, "service.max_body_mib must be above 0, received nan"),
        ({"max_megapixels": float("inf")}, "service.max_megapixels must be above 0, received inf"),
        ({"max_wait_ms": -1.0}, "service.max_wait_ms must be 0 or more"),
        ({"max_bodies_mib": 10.0}, "would wait for ever. Raise it"),
        ({"max_megapixels": 200.0}, "service.max_megapixels_in_flight is 96, less than one request may have"),
    ],
)
def test_limits_that_cannot_hold_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ServiceSettings(**changes)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_ends_in_one_message(port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("token_variable: null\nrewards: {plain: {class_path: tests.planted.Brightness}}\n")
    with pytest.raises(SystemExit) as caught:
        reward_server.main(["--config", str(config), f"--port={port}"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: port must be from 0 to 65535, received {port}.\n"


# ------------------------------------------------------------- pictures and bodies


def test_notes_of_a_picture_are_thrown_away() -> None:
    notes = PngInfo()
    notes.add_text("comment", "made by hand" * 100, zip=True)
    notes.add_itxt("title", "ü", zip=True)
    noted = png(size=(3, 2), pnginfo=notes, icc_profile=b"not a profile")
    (pixels,) = decode_images([b64(noted)], max_pixels=6)
    assert torch.equal(pixels, read_pixels(png(size=(3, 2)), "plain"))


def test_a_picture_taller_than_a_strip_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flow_rl.rewards.png.STRIP_PIXELS", 20)
    expected = torch.randint(0, 256, (3, 13, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    buffer = io.BytesIO()
    Image.fromarray(expected.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    assert read_header(buffer.getvalue(), "x").pixels == 91
    assert torch.equal(read_pixels(buffer.getvalue(), "x"), expected)


def test_messages_for_people_are_let_through() -> None:
    long = {"prompts": ['say "hi" \\ to {"a": [1, 2]}' * 50] * 8, "images": [GOOD] * 8, "categories": ["c"] * 8}
    for indent in (None, 8):
        check_form(bytearray(json.dumps(message(**long), indent=indent).encode()), 8)


def test_a_budget_is_shared_in_the_order_of_asking() -> None:
    async def run() -> list[str]:
        budget, heard = Budget(10), []

        async def hold(name: str, amount: int) -> None:
            async with budget.share(amount):
                heard.append(f"+{name}")
                assert budget.used <= 10
                await asyncio.sleep(0.01)
            heard.append(f"-{name}")

        tasks = [asyncio.create_task(hold(*each)) for each in (("a", 6), ("b", 6), ("c", 10), ("d", 1))]
        await asyncio.sleep(0)
        tasks[2].cancel()  # who gives up leaves the queue
        await asyncio.gather(*tasks, return_exceptions=True)
        assert budget.used == 0
        return heard

    heard = asyncio.run(run())
    assert heard[:3] == ["+a", "-a", "+b"]
    assert sorted(heard[3:]) == ["+d", "-b", "-d"]


def test_requests_wait_for_the_pixels_of_others() -> None:
    """Together the requests have three times the pixels that may be in flight."""
    reward = Gated()
    reward.gate.clear()
    settings = {"max_megapixels": 60e-6, "max_megapixels_in_flight": 70e-6, "max_wait_ms": 0}
    with serving({"gated": reward}, **settings) as (url, server):
        service = server.config.app.state.service if hasattr(server.config.app, "state") else None
        remote = RemoteReward(url, "gated", samples_per_request=2, connection=QUICK)
        future = remote.submit(uint8_samples(7))
        assert reward.entered.wait(10)
        deadline = time.monotonic() + 5
        while service.pixels.used < 60 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.pixels.used == 60
        reward.gate.set()
        assert torch.equal(future.result(10), Corner().score(uint8_samples(7)))
    assert max(map(len, reward.batches)) == 2
    assert service.pixels.used == service.bodies.used == 0


# ------------------------------------------------------------- connections and logs


def open_connection(url: str, sent: bytes = b"") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(sent)
    return connection


@pytest.mark.parametrize("sent", [b"", b"GET /he", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_connection_that_never_asks_is_closed(sent: bytes) -> None:
    with serving({"corner": Corner()}, limits=ConnectionLimits(header_s=0.2)) as (url, _):
        connection = open_connection(url, sent)
        assert connection.recv(1000) == b""  # within the socket's ten seconds


def test_a_request_after_an_answer_must_arrive_too() -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving({"corner": Corner()}, limits=ConnectionLimits(header_s=0.3)) as (url, _):
        connection = open_connection(url, request)
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(request[:20])  # the idle time limit no longer counts, the one of headers does
        assert connection.recv(1000) == b""


def test_silent_connections_give_way_to_others() -> None:
    limits = ConnectionLimits(connections=6)
    with serving({"corner": Corner()}, limits=limits) as (url, server):
        silent = [open_connection(url, b"GET /he") for _ in range(30)]
        for _ in range(3):
            assert httpx.get(f"{url}/health", timeout=5).status_code == 200
        assert len(server.server_state.connections) <= 6
        del silent


def test_a_log_that_strangers_fill_stays_short() -> None:
    throttle, passed = Throttle(records=3, seconds=0.2, length=50), []
    for number in range(100):
        record = logging.LogRecord("x", 30, "f", 1, "bad request %s", ("y" * 1000 + str(number),), None)
        if throttle.filter(record):
            passed.append(record.getMessage())
    assert len(passed) == 3
    assert max(map(len, passed)) < 60
    time.sleep(0.25)
    record = logging.LogRecord("x", 30, "f", 1, "bad request %s", ("z",), None)
    assert throttle.filter(record)
    assert "97 more like it were left out" in record.getMessage()


# ------------------------------------------------------------- the id of a request


def test_every_answer_has_the_id_of_its_request(client: TestClient) -> None:
    for answer in (
        client.get("/health"),
        client.post("/score", json=message()),
        client.post("/score", content=b"x"),
        client.get("/nowhere"),
    ):
        assert re.fullmatch("[0-9a-f]{32}", answer.headers[REQUEST_ID_HEADER])
    for given, kept in (("mine-1.2_3", True), ("x" * 65, False), ("a b", False)):
        answer = client.post("/score", json=message(), headers={REQUEST_ID_HEADER: given})
        assert (answer.headers[REQUEST_ID_HEADER] == given) is kept


def test_the_answer_to_another_request_stops_the_run() -> None:
    held: list[str] = []

    def mixed_up(number: int, body: dict) -> tuple[int, dict, bytes]:
        held.append(script.headers[-1][REQUEST_ID_HEADER.lower()])
        return 200, {REQUEST_ID_HEADER: held[0]}, scores_body([3.0] * len(body["images"]))

    with scripted(mixed_up) as (url, script):
        remote = RemoteReward(url, "corner", connection=QUICK)
        assert remote.score(uint8_samples(1)).tolist() == [3.0]
        with pytest.raises(Refused, match=r"was sent request '\w+' and sent the answer to request '\w+'"):
            remote.score(uint8_samples(1))
    assert len(set(held)) == 2


def test_a_service_that_numbers_its_answers_must_go_on_to() -> None:
    def once(number: int, body: dict) -> tuple[int, dict, bytes]:
        sent = script.headers[-1][REQUEST_ID_HEADER.lower()]
        return 200, {REQUEST_ID_HEADER: sent} if number == 1 else {}, scores_body([3.0] * len(body["images"]))

    with scripted(once) as (url, script):
        remote = RemoteReward(url, "corner", connection=QUICK)
        for _ in range(2):  # the first comes from a service that knows no ids
            assert remote.score(uint8_samples(1)).tolist() == [3.0]
        with pytest.raises(Refused, match="sent the answer without an id"):
            remote.score(uint8_samples(1))


def test_many_requests_are_shared_out_among_small_pools() -> None:
    async def run(url: str) -> list[int]:
        pool, most = ClientPool(20, timeout=None), [0, 0, 0]
        together = asyncio.Barrier(20)

        async def one() -> None:
            async with pool.stream("GET", f"{url}/health", content=b"", headers={}) as answer:
                await answer.aread()
                most[:] = map(max, zip(most, pool._running, strict=True))
                await together.wait()

        await asyncio.gather(*(one() for _ in range(20)))
        assert pool._running == [0, 0, 0]
        await pool.aclose()
        return most

    with serving({"corner": Corner()}) as (url, _):
        assert sorted(asyncio.run(run(url))) == [6, 7, 7]
    assert max(6, 7) <= POOL
