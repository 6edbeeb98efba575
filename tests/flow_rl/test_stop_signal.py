"""A wait ends soon after somebody asked to stop, and not before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flow_rl import stop_signal
from flow_rl.monitoring.panel import MonitorPanel
from flow_rl.rewards import Samples
from flow_rl.rewards.background import AsyncReward
from flow_rl.rl.reward_trial import try_rewards


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


def test_a_trial_call_waits_no_longer_than_anything_else() -> None:
    class Hanging(AsyncReward):
        def submit(self, samples: Samples) -> Future[Tensor]:
            return never

    never: Future[Tensor] = Future()
    samples = Samples(images=torch.zeros(2, 3, 4, 4), prompts=["a", "b"], categories=["c", "c"])
    stop_signal.note()
    with pytest.raises(stop_signal.StopAsked):
        try_rewards({"hanging": Hanging()}, lambda *_: True, samples)
    assert never.cancelled()


def test_the_first_look_is_given_up_and_a_later_one_ends() -> None:
    """Nothing has been trained at the first; a later one belongs to an iteration, after which the run stops."""
    first, later = (MonitorPanel(SimpleNamespace(), (), 1) for _ in range(2))
    later.load_state_dict({"latents": None, "velocities": None})
    first._give_way()
    stop_signal.note()
    later._give_way()
    with pytest.raises(stop_signal.StopAsked) as stop:
        first._give_way()
    assert not stop.value.between_updates  # no checkpoint of a panel that is half there
