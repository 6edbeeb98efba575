"""Fingerprints change with what scores depend on, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flow_rl.rewards import CompositeReward, GuardedReward, Part, Reward
from flow_rl.rewards.fingerprints import digest, digest_directory
from flow_rl.rewards.remote import RemoteReward
from tests.planted import Brightness


class Sharp(Reward):
    def __init__(self, power: float = 1.0, file: Path | None = None, network: nn.Module | None = None) -> None:
        self.power, self.file, self._network = power, file, network
        self._seen = 0

    def score(self, samples):
        self._seen += 1
        return torch.full((len(samples),), 3.0)


def test_settings_files_and_weights_count(tmp_path) -> None:
    file = tmp_path / "rubric.yaml"
    file.write_text("a")
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    makers = {
        "plain": lambda: Sharp(),
        "power": lambda: Sharp(2.0),
        "file": lambda: Sharp(file=file),
        "network": lambda: Sharp(network=network),
        "other class": lambda: Brightness(),
    }
    found = {name: make().fingerprint() for name, make in makers.items()}
    assert len(set(found.values())) == len(found)
    assert found == {name: make().fingerprint() for name, make in makers.items()}
    file.write_text("b")
    assert makers["file"]().fingerprint() != found["file"]
    with torch.no_grad():
        network.weight[0, 0] += 1e-7
    assert makers["network"]().fingerprint() != found["network"]


def test_scoring_does_not_change_it() -> None:
    reward = GuardedReward(Sharp(), "sharp")
    before = reward.fingerprint()
    from flow_rl.rewards import Samples

    reward.score(Samples(images=torch.zeros(2, 3, 4, 4), prompts=["a", "b"], categories=["c", "c"]))
    assert reward.fingerprint() == before


def test_nested_rewards_count() -> None:
    def composite(power: float, weight: float) -> CompositeReward:
        other = Part(reward=Brightness(), weight=1 - weight)
        return CompositeReward({"a": Part(reward=Sharp(power), weight=weight), "b": other})

    same = composite(1.0, 0.5).fingerprint()
    assert composite(1.0, 0.5).fingerprint() == same
    assert composite(2.0, 0.5).fingerprint() != same
    assert composite(1.0, 0.4).fingerprint() != same


def test_a_service_that_moved_is_the_same_reward() -> None:
    def remote(port: int, version: str, samples: int = 8) -> str:
        return RemoteReward(
            f"http://127.0.0.1:{port}", "face", version=version, samples_per_request=samples
        ).fingerprint()

    assert remote(8000, "1") == remote(9000, "1", samples=2)
    assert remote(8000, "1") != remote(8000, "2")


@pytest.mark.parametrize(("a", "b"), [(1, "1"), ([1, 2], [12]), ({"a": 1}, {"a": 2}), (True, 1), ([[1], 2], [1, [2]])])
def test_values_of_other_kinds_differ(a, b) -> None:
    assert digest(a) != digest(b)


def test_mappings_and_devices() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([torch.device("cpu")]) == digest([torch.device("cuda", 1)])


def test_directory_counts_by_names_and_content(tmp_path) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "a.bin").write_bytes(b"1")
    before = digest_directory(tmp_path / "model")
    (tmp_path / "model" / ".cache").mkdir()
    (tmp_path / "model" / ".cache" / "x").write_bytes(b"2")
    assert digest_directory(tmp_path / "model") == before
    (tmp_path / "model").rename(tmp_path / "moved")
    assert digest_directory(tmp_path / "moved") == before
    (tmp_path / "moved" / "sub" / "a.bin").rename(tmp_path / "moved" / "sub" / "b.bin")
    assert digest_directory(tmp_path / "moved") != before
    with pytest.raises(ValueError, match="no directory with files"):
        digest_directory(tmp_path / "nowhere")
