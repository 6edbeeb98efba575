"""Services that are down, slow, wrong or gone: no made-up score, a clear error, nothing hangs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from flow_rl.rewards.endpoint import EndpointSettings, _retry_after
from flow_rl.rewards.faults import FaultPolicy, Refused, RewardFailure
from flow_rl.rewards.remote import RemoteReward
from tests.flow_rl.rewards.loopback import QUICK, closed_port, scores_body, scripted, uint8_samples

TOLERANT = FaultPolicy(max_failing_share=1.0)


def remote(url: str, **changes: object) -> RemoteReward:
    return RemoteReward(url, "corner", **({"samples_per_request": 8, "connection": QUICK} | changes))


def test_down() -> None:
    url = closed_port()
    with pytest.raises(RewardFailure, match="could not score 8 of the last 8 samples") as caught:
        remote(url).score(uint8_samples(8))
    failure = caught.value
    assert (failure.url, failure.attempts, failure.last_status) == (f"{url}/score", 3, "ConnectError")
    assert url in str(failure)
    assert "3 attempts" in str(failure)


def test_down_within_the_tolerated_share_is_nan_and_never_a_number() -> None:
    reward = remote(closed_port(), faults=TOLERANT)
    assert reward.score(uint8_samples(3)).isnan().all()
    assert reward.statistics() == {"parse_rate": 0.0, "mask_rate": 1.0}


def test_slow() -> None:
    release = threading.Event()

    def answer(_: int, body: dict) -> tuple[int, dict, bytes]:
        release.wait(30)
        return 200, {}, scores_body([5.0] * len(body["images"]))

    with scripted(answer) as (url, script):
        connection = EndpointSettings(timeout_s=0.2, retries=1, backoff_s=0.01)
        with pytest.raises(RewardFailure, match=r"no answer within 0\.2 s \(last of 2 attempts\)") as caught:
            remote(url, connection=connection).score(uint8_samples(8))
        release.set()
    assert caught.value.last_status == "timeout"
    assert len(script.requests) == 2


def test_an_answer_that_drips_is_as_slow_as_none() -> None:
    """Each packet comes soon after the last, so a limit on the silence between them would never end."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        try:
            while not done.wait(0.02):
                connection.sendall(b" ")
        except OSError:
            pass
        connection.close()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        reward = remote(
            f"http://127.0.0.1:{listener.getsockname()[1]}",
            connection=EndpointSettings(timeout_s=0.4, retries=0),
        )
        with pytest.raises(RewardFailure, match=r"no answer within 0\.4 s"):
            reward.score(uint8_samples(8))
    finally:
        done.set()
        listener.close()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_failures_that_may_pass_are_retried(status: int) -> None:
    def answer(number: int, body: dict) -> tuple[int, dict, bytes]:
        if number < 2:
            return status, {}, b'{"detail": "busy"}'
        return 200, {}, scores_body([2.5] * len(body["images"]))

    with scripted(answer) as (url, script):
        reward = remote(url)
        assert reward.score(uint8_samples(3)).tolist() == [2.5] * 3
        assert reward.statistics()["retries"] == 2
    assert len(script.requests) == 3


@pytest.mark.parametrize("status", [429, 500])
def test_retries_are_bounded_and_the_error_says_what_came(status: int) -> None:
    with (
        scripted(lambda *_: (status, {}, b'{"detail": "out of memory"}')) as (url, script),
        pytest.raises(RewardFailure, match=f"{status} .*out of memory .last of 3 attempts") as caught,
    ):
        remote(url).score(uint8_samples(8))
    assert (caught.value.attempts, caught.value.last_status) == (3, status)
    assert len(script.requests) == 3


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_failures_that_will_not_pass_end_at_once(status: int) -> None:
    with (
        scripted(lambda *_: (status, {"location": "/"}, b"no")) as (url, script),
        pytest.raises(Refused, match=str(status)) as caught,
    ):
        remote(url, faults=TOLERANT).score(uint8_samples(8))
    assert (caught.value.url, caught.value.attempts, caught.value.last_status) == (f"{url}/score", 1, status)
    assert len(script.requests) == 1


def test_retry_after_is_honoured() -> None:
    def answer(number: int, body: dict) -> tuple[int, dict, bytes]:
        if number == 0:
            return 429, {"retry-after": "1"}, b""
        return 200, {}, scores_body([3.0])

    with scripted(answer) as (url, script):
        assert remote(url).score(uint8_samples(1)).tolist() == [3.0]
    assert script.times[1] - script.times[0] >= 1.0  # the backoff alone would be 0.015 s at most


def test_retry_after_as_a_date() -> None:
    now = datetime.now(UTC)
    assert 28 < _retry_after(format_datetime(now + timedelta(seconds=30), usegmt=True)) <= 30
    assert _retry_after(format_datetime(now - timedelta(seconds=30), usegmt=True)) == 0
    assert [_retry_after(value) for value in ("", "soon", "-5", "²", "7")] == [0, 0, 0, 0, 7]


def test_truncated_json_is_asked_for_once_more_and_then_nan() -> None:
    whole = scores_body([3.0] * 4)
    with scripted(lambda *_: (200, {}, whole[:-6])) as (url, script):
        reward = remote(url, faults=TOLERANT)
        assert reward.score(uint8_samples(4)).isnan().all()
        assert reward.statistics()["parse_rate"] == 0
        assert len(script.requests) == 2
        with pytest.raises(RewardFailure, match="cannot be read") as caught:
            remote(url).score(uint8_samples(8))
    assert (caught.value.url, caught.value.attempts, caught.value.last_status) == (f"{url}/score", 2, 200)


def test_truncated_json_once_costs_nothing_but_a_request() -> None:
    def answer(number: int, body: dict) -> tuple[int, dict, bytes]:
        whole = scores_body([3.0] * len(body["images"]))
        return 200, {}, whole if number else whole[:-6]

    with scripted(answer) as (url, _):
        assert remote(url).score(uint8_samples(4)).tolist() == [3.0] * 4


def test_a_connection_that_ends_before_the_body_does_is_retried() -> None:
    def answer(number: int, body: dict) -> tuple[int, dict, bytes]:
        whole = scores_body([3.0] * len(body["images"]))
        return (200, {}, whole) if number else (200, {"content-length": str(len(whole) + 9)}, whole)

    with scripted(answer) as (url, script):
        assert remote(url).score(uint8_samples(2)).tolist() == [3.0, 3.0]
    assert len(script.requests) == 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (scores_body([3.0]), "1 scores for 2 samples"),
        (scores_body([3.0] * 3), "3 scores for 2 samples"),
        (scores_body([3.0, 5.5]), "sent the score 5.5"),
        (scores_body([0.0, 0.0]), "sent the score 0"),
        (scores_body([3.0, "3.0"]), "scores.1"),
        (scores_body([3.0, 3.0], protocol=2), "this side speaks 1"),
        (scores_body([3.0, 3.0], reward="aesthetic"), "sent scores of 'aesthetic'"),
        (scores_body([3.0, 3.0], version="2"), "version '2', and the config asks for '1'"),
        (b'{"detail": "hello"}', "no answer of a scoring service"),
        (b"[1.0, 2.0]", "no answer of a scoring service"),
    ],
)
def test_answers_that_break_the_contract_end_at_once(body: bytes, words: str) -> None:
    with (
        scripted(lambda *_: (200, {}, body)) as (url, script),
        pytest.raises(Refused, match=re.escape(words)) as caught,
    ):
        remote(url, faults=TOLERANT, version="1" if b'"2"' in body else None).score(uint8_samples(2))
    assert caught.value.url == f"{url}/score"
    assert len(script.requests) == 1


@pytest.mark.parametrize("bad", ["null", "NaN", "Infinity", "-Infinity"])
def test_what_is_not_finite_is_asked_for_once_more_and_then_nan(bad: str) -> None:
    def answer(_: int, body: dict) -> tuple[int, dict, bytes]:
        listed = ", ".join(bad if prompt == "bad" else "4.0" for prompt in body["prompts"])
        return 200, {}, f'{{"reward": "corner", "scores": [{listed}]}}'.encode()

    samples = uint8_samples(10, prompts=["good"] * 9 + ["bad"])
    with scripted(answer) as (url, script):
        reward = remote(url)
        scores = reward.score(samples)
        assert scores[:9].tolist() == [4.0] * 9
        assert scores[9].isnan()
        assert [len(body["images"]) for body in script.requests] in ([8, 2, 1], [2, 8, 1])
        assert reward.statistics()["mask_rate"] == pytest.approx(0.1)


def test_nan_by_rule_is_an_answer_where_the_policy_says_so() -> None:
    with scripted(lambda *_: (200, {}, scores_body([None] * 8))) as (url, script):
        faults = FaultPolicy(max_failing_share=0.0, nan_is_failure=False)
        reward = remote(url, faults=faults)
        for _ in range(3):
            assert reward.score(uint8_samples(8)).isnan().all()
        assert reward.statistics()["parse_rate"] == 1
    assert len(script.requests) == 3


def test_nulls_beyond_the_share_stop_the_run_with_the_address() -> None:
    with (
        scripted(lambda *_: (200, {}, scores_body([None] * 8))) as (url, _),
        pytest.raises(RewardFailure, match="8 of the last 8") as caught,
    ):
        remote(url).score(uint8_samples(8))
    assert (caught.value.url, caught.value.attempts, caught.value.last_status) == (f"{url}/score", 2, 200)


def test_a_scorer_that_changes_during_the_run_stops_it() -> None:
    def answer(number: int, body: dict) -> tuple[int, dict, bytes]:
        return 200, {}, scores_body([3.0] * len(body["images"]), rubric_hash="aaaa" if number < 2 else "bbbb")

    with scripted(answer) as (url, _):
        reward = remote(url)
        for _ in range(2):
            assert reward.score(uint8_samples(1)).tolist() == [3.0]
        with pytest.raises(Refused, match="changed its rubric_hash from 'aaaa' to 'bbbb'"):
            reward.score(uint8_samples(1))
        with pytest.raises(Refused, match="the config asks for 'cccc'"):
            remote(url, rubric_hash="cccc").score(uint8_samples(1))


def test_monitoring_never_stops_a_run() -> None:
    faults = FaultPolicy(monitor_only=True, max_failing_share=0.0)
    with pytest.warns(UserWarning, match="monitoring only"):
        assert remote(closed_port(), faults=faults).score(uint8_samples(4)).isnan().all()
    with scripted(lambda *_: (401, {}, b"")) as (url, _), pytest.warns(UserWarning, match="401"):
        assert remote(url, faults=faults).score(uint8_samples(4)).isnan().all()


def test_the_run_stops_without_waiting_for_every_request_to_fail() -> None:
    with scripted(lambda *_: (500, {}, b"")) as (url, script):
        connection = EndpointSettings(timeout_s=5, retries=1, backoff_s=0.01, max_in_flight=2)
        with pytest.raises(RewardFailure):
            remote(url, connection=connection, samples_per_request=1).score(uint8_samples(200))
    # 10 % of 200 may fail: the 21st sample decides. Two requests each, and those in flight.
    assert 42 <= len(script.requests) <= 60


def test_a_huge_answer_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flow_rl.rewards.endpoint.MAX_ANSWER_BYTES", 1000)
    with scripted(lambda *_: (200, {}, b" " * 100_000)) as (url, _), pytest.raises(Refused, match="is it a scoring"):
        remote(url).score(uint8_samples(1))


def test_a_service_killed_while_it_scores(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("token_variable: null\nrewards:\n  slow: {class_path: sleeper.Sleeper}\n", encoding="utf-8")
    (tmp_path / "sleeper.py").write_text(
        "import time\nfrom flow_rl.rewards import Reward\n\n\nclass Sleeper(Reward):\n    def score(self, samples):\n"
        "        print('scoring', flush=True)\n        time.sleep(60)\n",
        encoding="utf-8",
    )
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "cli.reward_server", "--config", str(config), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        seen: list[str] = []
        url = next(m[1] for m in (re.search(r"running on (http://\S+)", line) for line in read(process, seen)) if m)
        connection = EndpointSettings(timeout_s=30, retries=1, backoff_s=0.01)
        future = RemoteReward(url, "slow", connection=connection).submit(uint8_samples(8))
        assert any("scoring" in line for line in read(process, seen))
        assert not future.done()
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        with pytest.raises(RewardFailure, match=r"gave no answer: ConnectError.*last of 2 attempts"):
            future.result(20)
    finally:
        process.kill()
        process.stdout.close()
        process.wait(10)


def read(process: subprocess.Popen, seen: list[str]):
    for line in process.stdout:
        seen.append(line)
        yield line
    raise AssertionError("the service ended: " + "".join(seen))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "gpu-7:8000"}, "must look like http://host:port, received 'gpu-7:8000/score'"),
        ({"url": "http://host:port"}, "must look like"),
        ({"url": "http://user:secret@host"}, "token_variable"),
        ({"reward": ""}, "reward is empty"),
        ({"token_variable": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
        ({"samples_per_request": 0}, "samples_per_request must be at least 1, received 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_sent(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        RemoteReward(**({"url": "http://127.0.0.1:1", "reward": "corner"} | changes))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"retries": -1}, {"backoff_s": -1}, {"max_in_flight": 0}],
)
def test_bad_connections_are_refused(changes: dict) -> None:
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name} must be .*received"):
        EndpointSettings(**changes)


def test_a_used_reward_can_be_pickled_and_copied_without_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN", "s3cret")

    def answer(_: int, body: dict) -> tuple[int, dict, bytes]:
        return 200, {}, scores_body([3.0] * len(body["images"]))

    with scripted(answer) as (url, script):
        reward = remote(url, token_variable="TEST_TOKEN")
        reward.score(uint8_samples(1))
        frozen = pickle.dumps(reward)
        assert b"s3cret" not in frozen
        for twin in (pickle.loads(frozen), copy.deepcopy(reward)):
            assert twin.score(uint8_samples(2)).tolist() == [3.0, 3.0]
    assert {headers["authorization"] for headers in script.headers} == {"Bearer s3cret"}
    assert "s3cret" not in json.dumps(script.requests)
