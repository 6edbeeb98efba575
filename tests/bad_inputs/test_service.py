"""What clients, browsers and strangers send to the scoring service and the voting page, and what they are told."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import socket
import struct
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
from flow_rl.evaluation import ballot as ballot_module
from flow_rl.evaluation import voting
from flow_rl.evaluation.ballot import Ballot, check_votes_file
from flow_rl.evaluation.battles import read_battles
from flow_rl.evaluation.vote_files import read_sources
from flow_rl.rewards.bodies import Budget, check_form
from flow_rl.rewards.client_pool import POOL, ClientPool
from flow_rl.rewards.connections import ConnectionLimits, Throttle
from flow_rl.rewards.faults import Refused
from flow_rl.rewards.png import read_header, read_pixels
from flow_rl.rewards.remote import RemoteReward
from flow_rl.rewards.service import ServiceSettings, build_app
from flow_rl.rewards.wire import REQUEST_ID_HEADER, decode_images
from tests.flow_rl.rewards.loopback import QUICK, Corner, Gated, scores_body, scripted, serving, uint8_samples


def png(mode: str = "RGB", size: tuple[int, int] = (2, 2), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A good picture with one more chunk after its header."""
    plain = png()
    return plain[:33] + chunk(kind, data) + plain[33:]


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


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


# ------------------------------------------------------------- the voting page


@pytest.fixture
def folders(tmp_path: Path) -> tuple[tuple[str, Path], tuple[str, Path]]:
    found = []
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "1.png").write_bytes(png())
        index(directory)
        found.append((name, directory))
    return tuple(found)


def index(directory: Path, **changes: Any) -> None:
    row = {"id": 1, "member": 0, "file": "1.png", "prompt": "<script>x</script>", "category": "c"} | changes
    (directory / "index.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def page_of(ballot: Ballot) -> TestClient:
    return TestClient(voting.build_app(ballot), base_url="http://localhost", follow_redirects=False)


#: what the index says of the image, and words of the refusal at start-up
FILES: dict[str, tuple[str, str]] = {
    "absolute": ("/etc/passwd", "lies outside of"),
    "above": ("../../etc/passwd", "lies outside of"),
    "of the other": ("../b/1.png", "lies outside of"),
    "a link": ("link.png", "lies outside of"),
    "a link to a folder": ("folder/passwd", "lies outside of"),
    "links in a circle": ("circle.png", "no path|no image"),
    "encoded": ("..%2f..%2fetc%2fpasswd", "no image"),
    "a zero byte": ("1.png\0.txt", "is no path"),
    "a long name": ("x" * 5000, "cannot be read|is no path"),
    "nothing": ("", "no image"),
    "a folder": (".", "no image"),
    "the index": ("index.jsonl", "is no PNG, JPEG, WebP or GIF"),
    "no picture": ("secret.png", "is no PNG, JPEG, WebP or GIF"),
    "damaged": ("damaged.png", "is damaged"),
    "missing": ("gone.png", "no image"),
}


@pytest.mark.parametrize("file, words", FILES.values(), ids=FILES.keys())  # noqa: PT006
def test_an_index_shows_its_own_pictures_alone(folders, tmp_path: Path, file: str, words: str) -> None:
    directory = folders[0][1]
    (directory / "link.png").symlink_to("/etc/passwd")
    (directory / "folder").symlink_to("/etc")
    (directory / "circle.png").symlink_to("circle.png")
    (directory / "secret.png").write_text("password")
    (directory / "damaged.png").write_bytes(png()[:40] + b"\0" * 40)
    index(directory, file=file)
    ballot = Ballot(*folders, tmp_path / "votes.jsonl")
    with pytest.raises(ValueError, match=rf"Prompt 1: .*({words})") as caught:
        ballot.check_images()
    assert len(str(caught.value)) < 1000
    (token,) = ballot.open()
    with page_of(ballot) as page:
        answers = [page.get(f"/image/{token}/{side}") for side in ("left", "right")]
    if file != "damaged.png":  # which is a picture all the same
        assert sorted(answer.status_code for answer in answers) == [200, 404]
    assert not any(b"root:" in answer.content or b"password" in answer.content for answer in answers)


def test_an_edit_file_shows_pictures_alone(folders, tmp_path: Path) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"id": 1, "source": "../../../../../../etc/passwd"}\n', encoding="utf-8")
    ballot = Ballot(*folders, tmp_path / "votes.jsonl", sources=read_sources(edits))
    with pytest.raises(ValueError, match=r"Prompt 1: .*passwd' is no PNG"):
        ballot.check_images()
    with page_of(ballot) as page:
        assert page.get(f"/image/{ballot.open()[0]}/source").status_code == 404


FORM = {"Content-Type": "application/x-www-form-urlencoded"}
#: headers, body (TOKEN is the battle's), and status
VOTES: dict[str, tuple[dict[str, str], str, int]] = {
    "another host": ({"Host": "evil.example"}, "battle=TOKEN&vote=left", 400),
    "its own host": ({"Host": "evil.example", "Origin": "http://evil.example"}, "battle=TOKEN&vote=left", 400),
    "another origin": ({"Origin": "http://evil.example"}, "battle=TOKEN&vote=left", 400),
    "a file's origin": ({"Origin": "null"}, "battle=TOKEN&vote=left", 400),
    "another port": ({"Origin": "http://localhost:3000"}, "battle=TOKEN&vote=left", 400),
    "another site": ({"Sec-Fetch-Site": "cross-site"}, "battle=TOKEN&vote=left", 400),
    "a sibling site": ({"Sec-Fetch-Site": "same-site"}, "battle=TOKEN&vote=left", 400),
    "plain text": ({"Content-Type": "text/plain"}, "battle=TOKEN&vote=left", 415),
    "JSON": ({"Content-Type": "application/json"}, '{"battle": "TOKEN", "vote": "left"}', 415),
    "no type": ({"Content-Type": ""}, "battle=TOKEN&vote=left", 415),
    "long": ({}, "battle=TOKEN&vote=left&" + "x" * 2000, 413),
    "two votes": ({}, "battle=TOKEN&vote=left&vote=right", 400),
    "two battles": ({}, "battle=TOKEN&battle=TOKEN&vote=left", 400),
    "something else": ({}, "battle=TOKEN&vote=left&admin=1", 400),
    "no vote": ({}, "battle=TOKEN", 400),
    "nothing": ({}, "", 400),
    "another vote": ({}, "battle=TOKEN&vote=middle", 400),
    "another battle": ({}, "battle=TOKENx&vote=left", 400),
    "no UTF-8": ({}, "battle=%ff&vote=left", 400),
}  # fmt: skip


@pytest.mark.parametrize("headers, body, status", VOTES.values(), ids=VOTES.keys())  # noqa: PT006
def test_what_is_no_vote_changes_nothing(folders, tmp_path: Path, headers: dict, body: str, status: int) -> None:
    ballot = Ballot(*folders, tmp_path / "votes.jsonl")
    with page_of(ballot) as page:
        content = body.replace("TOKEN", ballot.open()[0])
        assert page.post("/vote", content=content, headers=FORM | headers).status_code == status
        assert not (tmp_path / "votes.jsonl").exists()
        chunks = (part.encode() for part in [content, "&" + "x" * 2000])  # a body that does not say how long it is
        assert page.post("/vote", content=chunks, headers=FORM | headers).status_code >= 400
    assert ballot.voted == 0


def test_the_page_lies_in_no_frame_and_runs_no_script(folders, tmp_path: Path) -> None:
    ballot = Ballot(*folders, tmp_path / "votes.jsonl")
    with page_of(ballot) as page:
        answer = page.get("/", headers={"Sec-Fetch-Site": "cross-site"})  # a link may stand anywhere
        image = page.get(f"/image/{ballot.open()[0]}/left")
    assert answer.status_code == 200
    assert "<script>x" not in answer.text
    assert "&lt;script&gt;x" in answer.text
    for found in (answer, image):
        assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert found.headers["x-frame-options"] == "DENY"
        assert found.headers["cross-origin-resource-policy"] == "same-origin"
    assert image.headers["content-type"] == "image/png"


def row(**changes: Any) -> bytes:
    return json.dumps({"id": 2, "member": 0, "file": "x", "prompt": "", "category": ""} | changes).encode()


#: a line of a file, and words of the message
LINES: dict[str, tuple[bytes, str]] = {
    "torn": (b'{"id": 1, "mem', "line 2: not JSON .*Remove the line if it is torn"),
    "not UTF-8": (b'{"id": 1, "prompt": "\xff"}', "line 2: not UTF-8"),
    "no object": (b"[1]", "line 2: expected an object"),
    "missing": (b'{"id": 1}', "line 2: .*member, file, prompt, category is missing"),
    "a text as id": (row(id="1"), "'id' must be int"),
    "true as id": (row(id=True), "'id' must be int, received True"),
    "twice": (b'{"id": 1, "id": 2}', "line 2: 'id' is there twice"),
    "NaN": (b'{"id": NaN}', "line 2: NaN is no number"),
    "a long number": (b'{"id": ' + b"9" * 5000 + b"}", "line 2: "),
    "deep": (b"[" * 100_000, "line 2: (brackets in brackets|not JSON)"),
    "half an emoji": (row(prompt="\ud83d"), "'prompt' has half a character"),
}  # fmt: skip


@pytest.mark.parametrize("line, words", LINES.values(), ids=LINES.keys())  # noqa: PT006
def test_lines_that_cannot_be_read_are_named(folders, tmp_path: Path, line: bytes, words: str) -> None:
    path = folders[0][1] / "index.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=rf"index\.jsonl, {words}|index\.jsonl, line 2: .*{words}") as caught:
        Ballot(*folders, tmp_path / "votes.jsonl")
    assert len(str(caught.value)) < 600
    votes = tmp_path / "battles.jsonl"
    votes.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"battles\.jsonl, line 2: "):
        read_battles(votes)


def test_a_vote_after_a_torn_line_stays_whole(folders, tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    ballot = Ballot(*folders, votes)
    votes.write_text('{"prompt": 1, "mem', encoding="utf-8")  # by another voter, since
    ballot.vote(ballot.open()[0], "left")
    torn, vote, rest = votes.read_text().split("\n")
    assert (torn, rest) == ('{"prompt": 1, "mem', "")
    assert json.loads(vote)["prompt"] == 1


def test_a_vote_that_the_disk_does_not_take_does_not_count(
    folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = tmp_path / "votes.jsonl"
    votes.write_text("\n", encoding="utf-8")
    ballot = Ballot(*folders, votes)
    write = ballot_module.os.write
    monkeypatch.setattr(ballot_module.os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    with page_of(ballot) as page:
        answer = page.post("/vote", data={"battle": ballot.open()[0], "vote": "left"})
    monkeypatch.undo()
    assert answer.status_code == 507
    assert "could not be written" in answer.json()["detail"]
    assert re.match(r"error: a vote was not written: .*10 of \d+ bytes .*votes\.jsonl", capsys.readouterr().err)
    assert votes.read_text(encoding="utf-8") == "\n"
    assert ballot.voted == 0


def test_votes_need_a_file(tmp_path: Path, folders, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected a file"):
        check_votes_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Votes cannot be written to .*(Not a directory|File exists)"):
        check_votes_file(tmp_path / "file" / "votes.jsonl")
    given = [f"--left={folders[0][1]}", f"--right={folders[1][1]}", f"--votes={tmp_path / 'v.jsonl'}"]
    for more, words in (
        ("--port=70000", "--port must be from 0 to 65535, received 70000"),
        (f"--votes={tmp_path}", "expected a file"),
        (f"--edits={tmp_path / 'none.jsonl'}", "No file"),
    ):
        with pytest.raises(SystemExit) as caught:
            voting.main([*given, more])
        assert caught.value.code == 2
        assert words in capsys.readouterr().err
