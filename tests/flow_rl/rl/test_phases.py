"""The clock on a device that lags behind the host: each phase gets the time of its own work."""

from __future__ import annotations

import pytest
import torch

from flow_rl.rl.phases import PhaseClock


class Stream:
    """A device that does queued work in order; marks are over once it has reached them."""

    def __init__(self) -> None:
        self.queued, self.done, self.waits = 0.0, 0.0, 0

    def work(self, seconds: float) -> None:
        self.queued += seconds

    def mark(self) -> Mark:
        return Mark(self)


class Mark:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at = stream, stream.queued

    def query(self) -> bool:
        return self.at <= self.stream.done

    def synchronize(self) -> None:
        self.stream.waits += 1
        self.stream.done = max(self.stream.done, self.at)

    def elapsed_time(self, later: Mark) -> float:
        assert later.query(), "nobody may ask before it is over"
        return (later.at - self.at) * 1000


@pytest.fixture
def stream() -> Stream:
    return Stream()


def clock_of(stream: Stream) -> PhaseClock:
    clock = PhaseClock()
    clock.mark = stream.mark
    return clock


def test_queued_work_counts_to_the_phase_that_queued_it(stream: Stream) -> None:
    clock = clock_of(stream)
    with clock.phase("rollout"):
        stream.work(8)
    with clock.phase("reward"):  # the host is here long before the rollout is over
        stream.work(1)
        with clock.phase("reward_wait"):
            stream.work(2)
        stream.work(1)
    stream.work(100)  # in no phase
    with clock.phase("update"):
        stream.work(3)
    assert stream.waits == 0
    assert clock.drain()[0] == pytest.approx({"rollout": 8.0, "reward": 2.0, "reward_wait": 2.0, "update": 3.0})
    assert stream.waits == 1
    with clock.phase("rollout"):
        stream.work(5)
    assert clock.drain()[0] == pytest.approx({"rollout": 5.0})
    assert clock.drain()[0] == {}


def test_what_is_over_is_counted_although_nobody_drains(stream: Stream) -> None:
    clock = clock_of(stream)
    for _ in range(100):
        with clock.phase("rollout"):
            stream.work(1)
        stream.done = stream.queued
    assert len(clock._changes) < 5
    assert stream.waits == 0
    assert clock.drain()[0] == pytest.approx({"rollout": 100.0})


def test_a_cpu_has_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = PhaseClock()
    clock.follow(torch.device("cpu"))
    with clock.phase("update"):
        now[0] += 3
    assert clock.drain()[0] == {"update": 3.0}
