"""`python -m cli.reward_server`: what a config builds, and what it is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli import reward_server
from flow_rl.rewards.composite import CompositeReward
from flow_rl.rewards.endpoint import EndpointSettings
from flow_rl.rewards.faults import FaultPolicy, GuardedReward
from flow_rl.rewards.openai import OpenAIReward
from flow_rl.rewards.remote import RemoteReward

CONFIG = """
host: 0.0.0.0
token_variable: TEST_TOKEN
service: {max_batch: 7, max_wait_ms: 0}
rewards:
  plain: {class_path: tests.planted.Brightness}
  far:
    class_path: flow_rl.rewards.remote.RemoteReward
    init_args:
      url: http://127.0.0.1:1/
      reward: quality
      connection: {timeout_s: 3, retries: 0}
      faults: {monitor_only: true}
  engine:
    class_path: flow_rl.rewards.openai.OpenAIReward
    init_args: {url: http://127.0.0.1:1/v1, model: judge, rubric: aesthetic}
  both:
    class_path: flow_rl.rewards.composite.CompositeReward
    init_args:
      components:
        bright:
          reward:
            class_path: flow_rl.rewards.faults.GuardedReward
            init_args: {name: bright, reward: {class_path: tests.planted.Brightness}}
          weight: 0.75
        dark: {reward: {class_path: tests.planted.Brightness}, weight: 0.25, low: 2, high: 4}
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would have been served, instead of serving it."""
    calls: list[tuple] = []
    monkeypatch.setattr(reward_server, "run", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("TEST_TOKEN", "s3cret")
    return calls


def write(directory: Path, text: str) -> str:
    path = directory / "server.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_config_names_rewards_by_class_and_the_command_line_wins(tmp_path: Path, started: list[tuple]) -> None:
    reward_server.main(["--config", write(tmp_path, CONFIG), "--port", "9", "--service.max_wait_ms", "5"])
    [(app, host, port)] = started
    service = app.state.service
    assert (host, port) == ("0.0.0.0", 9)
    assert (service.settings.max_batch, service.settings.max_wait_ms) == (7, 5)
    rewards = service.rewards
    assert list(rewards) == ["plain", "far", "engine", "both"]
    far = rewards["far"]
    assert isinstance(far, RemoteReward)
    assert far.endpoint.url == "http://127.0.0.1:1/score"
    assert far.endpoint.settings == EndpointSettings(timeout_s=3, retries=0)
    assert far.log.policy == FaultPolicy(monitor_only=True)
    engine = rewards["engine"]
    assert isinstance(engine, OpenAIReward)
    assert service.identities["engine"].rubric_hash == engine.rubric.hash
    both = rewards["both"]
    assert isinstance(both, CompositeReward)
    assert isinstance(both.components["bright"].reward, GuardedReward)
    assert both.components["dark"].low == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CONFIG.replace("max_batch", "max_bach"), "Did you mean 'max_batch'"),
        (
            CONFIG.replace("tests.planted.Brightness}\n  far", "tests.planted.Brightnes}\n  far"),
            "tests.planted.Brightness",
        ),
        (CONFIG.replace("token_variable: TEST_TOKEN", "token_variable: null"), "reached from other machines"),
        (CONFIG.replace("TEST_TOKEN", "OTHER_TOKEN"), "OTHER_TOKEN is not set"),
        (CONFIG.replace("max_batch: 7", "max_batch: 0"), "max_batch must be above 0"),
        (CONFIG.replace("rubric: aesthetic", "rubric: aesthetics"), "Did you mean 'aesthetic'"),
        (CONFIG.replace("weight: 0.75", "weight: 0.5"), "sum to 1"),
        ("token_variable: TEST_TOKEN\nrewards: {}\n", "rewards is empty"),
        ("token_variable: TEST_TOKEN\n", "rewards"),
    ],
)
def test_bad_configs_end_in_one_message(
    text: str, words: str, tmp_path: Path, started: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        reward_server.main(["--config", write(tmp_path, text)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert message.count("\n") == 1
    assert not started


def test_without_a_token_this_machine_alone_is_served(tmp_path: Path, started: list[tuple]) -> None:
    text = "token_variable: null\nrewards: {plain: {class_path: tests.planted.Brightness}}\n"
    for host in ("127.0.0.1", "::1", "localhost"):
        reward_server.main(["--config", write(tmp_path, text), "--host", host])
    assert [host for _, host, _ in started] == ["127.0.0.1", "::1", "localhost"]
