"""A wait ends soon after somebody asked to stop, and not before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from flow_rl import stop_signal


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    monkeypatch.setattr(stop_signal, "PATIENCE_S", 0.0)
    stop_signal.forget()
    yield
    stop_signal.forget()


def test_a_wait_for_what_never_comes_is_given_up_and_cancelled() -> None:
    never: Future[int] = Future()
    stop_signal.note()
    with pytest.raises(stop_signal.StopAsked) as stop:
        stop_signal.wait_for(never)
    assert stop.value.code == 143
    assert never.cancelled()


def test_a_result_is_returned_although_a_stop_was_asked_for() -> None:
    done: Future[int] = Future()
    done.set_result(3)
    stop_signal.note()
    assert stop_signal.wait_for(done) == 3


def test_without_a_request_a_wait_goes_on_until_its_result_or_error() -> None:
    def late(error: bool) -> int:
        import time

        time.sleep(0.3)
        if error:
            raise TimeoutError("the reward's own")
        return 4

    with ThreadPoolExecutor(1) as pool:
        assert stop_signal.wait_for(pool.submit(late, False)) == 4
        with pytest.raises(TimeoutError, match="the reward's own"):
            stop_signal.wait_for(pool.submit(late, True))
