"""What a worker of torchrun is warned of; what it does when torchrun is gone is in tests/dist/test_dist_launcher.py."""

from __future__ import annotations

import pytest

from strategies.resume import OWN_STORE, warning_of_restarts

RESTARTS = {"RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_restarts_at_a_shared_store_are_warned_of() -> None:
    message = warning_of_restarts(RESTARTS)
    assert "--max-restarts=3" in message
    assert f"{OWN_STORE}=1" in message


@pytest.mark.parametrize(
    "change",
    [{"RANK": "1"}, {"TORCHELASTIC_MAX_RESTARTS": "0"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}],
    ids=str,
)
def test_others_are_not(change: dict[str, str]) -> None:
    assert warning_of_restarts(RESTARTS | change) is None


def test_without_torchrun_nothing_is_said() -> None:
    assert warning_of_restarts({}) is None
