"""The scoring service over a real connection: equal scores, merged batches, limits."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from flow_rl.rewards import Samples
from flow_rl.rewards.faults import FaultPolicy, Refused, RewardFailure
from flow_rl.rewards.pixels import dequantise, quantise
from flow_rl.rewards.remote import RemoteReward
from flow_rl.rewards.wire import decode_images, encode_base64
from tests.flow_rl.rewards.loopback import QUICK, Corner, Gated, scripted, serving, uint8_samples


def png_base64(mode: str = "RGB", size: tuple[int, int] = (2, 2)) -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def message(**changes: object) -> dict:
    fields = {"protocol": 1, "reward": "corner", "images": [png_base64()], "prompts": ["p"], "categories": ["c"]}
    return fields | changes


def test_images_of_eight_bits_survive_the_wire_bit_for_bit() -> None:
    every_value = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    images = every_value.float() / 255
    decoded = decode_images([encode_base64(quantise(images)[0])], max_pixels=256)
    assert torch.equal(decoded[0], every_value[0])
    assert torch.equal(dequantise(decoded[0]), images[0])


def test_float_images_are_rounded_to_the_nearest_of_256_values() -> None:
    images = torch.tensor([[-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0]]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert quantise(images)[0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("edit", [False, True])
def test_scores_through_the_service_equal_local_ones(edit: bool) -> None:
    samples = uint8_samples(21, edit=edit)
    with serving({"corner": Corner()}, max_batch=4) as (url, _):
        remote = RemoteReward(url, "corner", samples_per_request=5, connection=QUICK)
        scores = remote.score(samples)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, Corner().score(samples))
    assert len(scores.unique()) > 10


def test_nan_stays_nan_and_leaves_its_neighbours_alone() -> None:
    samples = uint8_samples(4, prompts=["a", "nan", "b", "c"])
    reward = Gated()
    with serving({"gated": reward}) as (url, _):
        faults = FaultPolicy(max_failing_share=0.5)
        remote = RemoteReward(url, "gated", connection=QUICK, faults=faults)
        scores = remote.score(samples)
        statistics = remote.statistics()
    assert scores.isnan().tolist() == [False, True, False, False]
    assert torch.equal(scores[[0, 2, 3]], Corner().score(samples)[[0, 2, 3]])
    assert reward.batches == [["a", "nan", "b", "c"], ["nan"]]  # asked once more, by itself
    assert (statistics["parse_rate"], statistics["mask_rate"]) == (0.75, 0.25)
    assert remote.statistics() == {}


def test_images_that_are_not_finite_are_not_sent() -> None:
    samples = uint8_samples(2)
    samples.images[0, 0, 0, 0] = torch.inf
    reward = Gated()
    with serving({"gated": reward}) as (url, _):
        scores = RemoteReward(url, "gated", connection=QUICK).score(samples)
    assert scores.isnan().tolist() == [True, False]
    assert reward.batches == [[samples.prompts[1]]]


def test_requests_of_many_clients_are_merged() -> None:
    reward = Gated()
    reward.gate.clear()
    with serving({"gated": reward}, max_batch=6, max_wait_ms=0) as (url, _):
        clients = [RemoteReward(url, "gated", connection=QUICK) for _ in range(7)]
        with ThreadPoolExecutor(7) as pool:
            first = pool.submit(clients[0].score, uint8_samples(1))
            assert reward.entered.wait(10)  # the worker is busy: the others gather
            others = [pool.submit(client.score, uint8_samples(2)) for client in clients[1:]]
            wait_until(lambda: httpx.get(f"{url}/health").json()["queued"] == 12)
            reward.gate.set()
            for future in others:
                assert torch.equal(future.result(10), Corner().score(uint8_samples(2)))
            assert torch.equal(first.result(10), Corner().score(uint8_samples(1)))
    assert [len(batch) for batch in reward.batches] == [1, 6, 6]


def test_sizes_and_edits_are_not_mixed_in_a_batch() -> None:
    reward = Gated()
    with serving({"gated": reward}, max_wait_ms=200) as (url, _), ThreadPoolExecutor(3) as pool:
        kinds = [uint8_samples(2), uint8_samples(2, size=(4, 4)), uint8_samples(2, edit=True)]
        clients = [RemoteReward(url, "gated", connection=QUICK) for _ in kinds]
        results = list(pool.map(lambda client, samples: client.score(samples), clients, kinds))
    for samples, scores in zip(kinds, results, strict=True):
        assert torch.equal(scores, Corner().score(samples))
    assert sorted(map(len, reward.batches)) == [2, 2, 2]


def test_a_request_that_breaks_the_reward_does_not_break_the_others() -> None:
    reward = Gated()
    reward.gate.clear()
    with serving({"gated": reward}, max_wait_ms=0) as (url, _), ThreadPoolExecutor(3) as pool:
        connection = type(QUICK)(retries=0)
        first, good, bad = (RemoteReward(url, "gated", connection=connection) for _ in range(3))
        waits = pool.submit(first.score, uint8_samples(1))
        assert reward.entered.wait(10)
        fine = pool.submit(good.score, uint8_samples(2))
        broken = pool.submit(bad.score, uint8_samples(8, prompts=["raise"] * 8))
        wait_until(lambda: httpx.get(f"{url}/health").json()["queued"] == 10)
        reward.gate.set()
        assert torch.equal(fine.result(10), Corner().score(uint8_samples(2)))
        with pytest.raises(RewardFailure, match="CUDA is on fire"):
            broken.result(10)
        waits.result(10)


def test_the_service_goes_on_after_clients_that_gave_up() -> None:
    reward = Gated()
    reward.gate.clear()
    with serving({"gated": reward}, max_wait_ms=0) as (url, _):
        impatient = RemoteReward(url, "gated", connection=type(QUICK)(timeout_s=0.3, retries=0))
        blocker = impatient.submit(uint8_samples(8))
        assert reward.entered.wait(10)
        queued = impatient.submit(uint8_samples(8, prompts=["given up"] * 8))
        for future in (blocker, queued):
            with pytest.raises(RewardFailure, match=r"no answer within 0\.3 s"):
                future.result(10)
        wait_until(lambda: httpx.get(f"{url}/health").json()["requests"] == 0)
        reward.gate.set()
        patient = RemoteReward(url, "gated", connection=QUICK)
        assert torch.equal(patient.score(uint8_samples(3)), Corner().score(uint8_samples(3)))
    assert ["given up"] * 8 not in reward.batches  # nobody waits for it: not scored


def test_too_many_requests_are_told_to_come_back_and_do() -> None:
    reward = Gated()
    reward.gate.clear()
    with serving({"gated": reward}, max_requests=1) as (url, _):
        remote = RemoteReward(url, "gated", connection=QUICK)
        first = remote.submit(uint8_samples(2))
        assert reward.entered.wait(10)
        refused = httpx.post(f"{url}/score", json=message(reward="gated"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        second = remote.submit(uint8_samples(3))
        reward.gate.set()
        assert torch.equal(first.result(10), Corner().score(uint8_samples(2)))
        assert torch.equal(second.result(10), Corner().score(uint8_samples(3)))


def test_health_is_open_and_version_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"corner": Corner()}, token="s3cret") as (url, _):
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "requests": 0, "queued": 0, "running_s": 0.0}
        assert httpx.get(f"{url}/version").status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        answer = httpx.get(f"{url}/version", headers=headers).json()
        assert answer == {"protocol": 1, "rewards": {"corner": {"version": "corner-1", "rubric_hash": None}}}
        monkeypatch.setenv("TEST_TOKEN", "s3cret")
        remote = RemoteReward(url, "corner", token_variable="TEST_TOKEN", connection=QUICK)
        assert torch.equal(remote.score(uint8_samples(2)), Corner().score(uint8_samples(2)))
        assert "s3cret" not in repr(vars(remote)) + repr(vars(remote.endpoint))


def test_a_wrong_token_is_refused_at_once_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN", "guess")
    noise = Samples(images=torch.rand(2, 3, 700, 700), prompts=["p"] * 2, categories=["c"] * 2)
    with serving({"corner": Corner()}, token="s3cret") as (url, _):
        for samples in (uint8_samples(2), noise):  # a body larger than the sockets' buffers, too
            with pytest.raises(Refused, match=r"401 Unauthorized.*TEST_TOKEN") as caught:
                RemoteReward(url, "corner", token_variable="TEST_TOKEN", connection=QUICK).score(samples)
            assert (caught.value.attempts, caught.value.last_status) == (1, 401)
            assert "guess" not in str(caught.value)


def test_a_huge_body_is_refused_with_advice() -> None:
    samples = Samples(images=torch.rand(8, 3, 400, 400), prompts=["p"] * 8, categories=["c"] * 8)
    with serving({"corner": Corner()}, max_body_mib=0.5) as (url, _):
        with pytest.raises(Refused, match=r"413.*samples_per_request"):
            RemoteReward(url, "corner", connection=QUICK).score(samples)

        def endless():  # chunked: no length is announced
            for _ in range(40):
                yield b" " * 2**16

        assert httpx.post(f"{url}/score", content=endless()).status_code == 413


@pytest.fixture(scope="module")
def small_service() -> Iterator[str]:
    with serving({"corner": Corner()}, max_megapixels=1) as (url, _):
        yield url


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": ["p", "q"]}, "as many entries of each kind"),
        ({"images": [], "prompts": [], "categories": []}, "at least one sample"),
        ({"images": ["%%%"]}, r"images\[0\] is not base64"),
        ({"images": [base64.b64encode(b"GIF89a").decode()]}, r"images\[0\] is not a PNG"),
        ({"images": [png_base64("RGBA")]}, "mode 'RGBA'"),
        ({"images": [png_base64()[:40]]}, r"images\[0\]"),
        ({"images": [png_base64(size=(2000, 1000))]}, "more than 1000000 pixels"),
        ({"sources": [png_base64(size=(1000, 1000))]}, "sources hold more than"),
        ({"protocol": 2}, "this side speaks 1"),
        ({"prompts": [3]}, "prompts.0"),
        ({"pickle": "gASV"}, "pickle"),
    ],
)
def test_bad_requests_are_explained(changes: dict, words: str, small_service: str) -> None:
    answer = httpx.post(f"{small_service}/score", json=message(**changes))
    assert answer.status_code == 400
    assert re.search(words, answer.json()["detail"])


def test_other_bodies_names_and_methods() -> None:
    with serving({"corner": Corner()}) as (url, _):
        assert httpx.post(f"{url}/score", content=b"\x80\x04K\x01.").status_code == 400  # a pickle
        assert httpx.post(f"{url}/score", content=json.dumps(message())[:-5]).status_code == 400
        assert httpx.get(f"{url}/score").status_code == 405
        with pytest.raises(Refused, match=r"404.*Did you mean 'corner'"):
            RemoteReward(url, "korner", connection=QUICK).score(uint8_samples(1))


@pytest.mark.parametrize(
    ("prompt", "status", "words"),
    [
        ("raise", 500, "RuntimeError: CUDA is on fire"),
        ("short", 422, r"shape \(2,\) for 1 samples"),
        ("refuse", 400, "refuses these samples: no source images"),
    ],
)
def test_errors_of_a_reward_reach_the_client(prompt: str, status: int, words: str) -> None:
    with serving({"gated": Gated()}) as (url, _):
        answer = httpx.post(f"{url}/score", json=message(reward="gated", prompts=[prompt]))
        assert answer.status_code == status
        assert re.search(words, answer.json()["detail"])
        assert httpx.post(f"{url}/score", json=message(reward="gated")).json()["scores"] == [1.0]  # and it goes on


def test_damaged_pixels_are_explained() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    cut = base64.b64encode(buffer.getvalue()[:2000]).decode()
    with pytest.raises(ValueError, match=r"sources\[0\] is damaged"):
        decode_images([cut], max_pixels=10**6, field="sources")


def test_submit_returns_before_the_scores_are_there() -> None:
    reward = Gated()
    reward.gate.clear()
    with serving({"gated": reward}) as (url, _):
        remote = RemoteReward(url, "gated", connection=QUICK)
        samples = uint8_samples(3)
        expected = Corner().score(samples)
        future = remote.submit(samples)
        samples.images.zero_()  # the trainer reuses its memory
        assert not future.done()
        reward.gate.set()
        assert torch.equal(future.result(10), expected)
        remote.close()
        assert torch.equal(remote.score(uint8_samples(2)), Corner().score(uint8_samples(2)))


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def answer(_: int, body: dict) -> tuple[int, dict, bytes]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait(10)  # passes only when three are there together
        with lock:
            running -= 1
        return 200, {}, json.dumps({"reward": "corner", "scores": [3.0] * len(body["images"])}).encode()

    barrier = threading.Barrier(3)
    with scripted(answer) as (url, script):
        connection = type(QUICK)(timeout_s=20, retries=0, max_in_flight=3)
        remote = RemoteReward(url, "corner", samples_per_request=2, connection=connection)
        assert remote.score(uint8_samples(18)).tolist() == [3.0] * 18
    assert most == 3
    assert len(script.requests) == 9


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("waited ten seconds in vain")
