"""The trial call of every reward: it finds what the first rollout would, and leaves no trace."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from callbacks.reward_trial import RewardTrial
from flow_rl.batches import Prompts
from flow_rl.errors import RunStopped
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.background import AsyncReward
from flow_rl.rewards.category import CategoryReward
from flow_rl.rewards.faults import FaultLog, FaultPolicy, GuardedReward, RewardFailure, Unreachable
from flow_rl.rl.reward_trial import SAMPLES, trial_prompts, trial_samples, try_rewards
from tests.planted import Brightness

CPU = torch.device("cpu")


def table(categories: tuple[str, ...], *, edit: bool = False) -> Prompts:
    count = len(categories)
    texts = tuple(f"a pot {i}" for i in range(count))
    sources = torch.rand(count, 3, 8, 8) if edit else None
    return Prompts(ids=tuple(range(count)), texts=texts, categories=categories, sources=sources)


def samples(**kind: bool) -> Samples:
    return trial_samples(trial_prompts(table(("plant", "portrait"), **kind)), (8, 8), CPU)


class Returning(Reward):
    def __init__(self, value: object) -> None:
        self.value = value

    def score(self, samples: Samples) -> object:
        return self.value(samples) if callable(self.value) else self.value


class Later(AsyncReward):
    """A service: what its future ends with."""

    def __init__(self, result: object) -> None:
        self.result = result

    def submit(self, samples: Samples) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        if isinstance(self.result, Exception):
            future.set_exception(self.result)
        else:
            future.set_result(self.result)
        return future


class Silent(Later):
    """A service that does not answer: its samples are NaN, as few failures may be."""

    def __init__(self) -> None:
        super().__init__(torch.full((2,), torch.nan))
        self.log = FaultLog("silent", FaultPolicy())

    def submit(self, samples: Samples) -> Future[Tensor]:
        self.log.last_failure = Unreachable("http://127.0.0.1:9 refused the connection", url="http://127.0.0.1:9")
        self.log.scored(torch.full((2,), torch.nan), parsed=0, failed=2)
        return super().submit(samples)


def raising(_: Samples) -> Tensor:
    raise KeyError("weights")


def painting(samples: Samples) -> Tensor:
    samples.images.zero_()
    return torch.ones(len(samples))


#: a reward, and words of the message
BROKEN: dict[str, tuple[Reward, str]] = {
    "raises": (Returning(raising), "raised KeyError: 'weights'"),
    "returns nothing": (Returning(None), "returned nothing (None)"),
    "one number for all": (Returning(3.0), "One number for all samples"),
    "a column": (Returning(torch.ones(2, 1)), "scores.squeeze(1)"),
    "too few": (Returning([3.0]), "shape (1,) for 2 samples"),
    "texts": (Returning(["good", "bad"]), "the text 'good'"),
    "off the scale": (Returning(torch.tensor([0.0, 1.0])), "the scale is 1..5"),
    "percent": (Returning([90.0, 80.0]), "are off the scale"),
    "changes the images": (Returning(painting), "changed the images"),
    "service that raises": (Later(ConnectionError("refused")), "raised ConnectionError: refused"),
    "service of a wrong shape": (Later(torch.ones(5)), "shape (5,) for 2 samples"),
    "service that does not answer": (Silent(), "http://127.0.0.1:9 refused the connection"),
    "inside another": (GuardedReward(Returning(None), "inner"), "returned nothing (None)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_ends_the_run_before_it_begins(name: str) -> None:
    reward, words = BROKEN[name]
    with pytest.raises(RunStopped) as error:
        try_rewards({"good": Brightness(), "mine": reward}, lambda *_: True, samples())
    assert words in str(error.value)
    assert "Reward 'mine'" in str(error.value)
    assert any("before training" in note for note in error.value.__notes__)


class Drawing(Reward):
    def score(self, samples: Samples) -> Tensor:
        return 1 + 4 * torch.rand(len(samples))


@pytest.mark.filterwarnings("ignore:Reward 'drawing' drew")
def test_no_stream_of_random_numbers_moves() -> None:
    def scores(*, tried: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        reward = Drawing()
        from flow_rl.rewards.asking import ask

        ask(reward, samples(), "drawing")
        if tried:
            try_rewards({"drawing": reward}, lambda *_: True, samples())
        return ask(reward, samples(), "drawing"), torch.rand(4)

    for one, other in zip(scores(tried=True), scores(tried=False), strict=True):
        assert torch.equal(one, other)


def test_counts_of_training_begin_after_it() -> None:
    reward = GuardedReward(Brightness(), "guarded")
    try_rewards({"guarded": reward}, lambda *_: True, samples())
    assert reward.statistics() == {}
    assert reward.log.last_failure is None


def test_masked_samples_are_no_fault() -> None:
    """Every category has a sample, so a reward of one of them scores; one that masks all of them may."""
    only = CategoryReward(Brightness(), ["portrait"])
    nothing = GuardedReward(Returning([None, None]), "rule", FaultPolicy(nan_is_failure=False))
    try_rewards({"only": only, "nothing": nothing}, lambda *_: True, samples())


def test_a_service_is_dead_where_it_does_not_answer_and_not_where_noise_shows_nothing() -> None:
    with pytest.raises(RewardFailure, match=r"none of the 2 images .* model\.check_rewards=false") as error:
        try_rewards({"silent": Silent()}, lambda *_: True, samples())
    assert error.value.url == "http://127.0.0.1:9"
    none = GuardedReward(Returning(lambda s: [None] * len(s)), "none")
    with pytest.warns(UserWarning, match="Reward 'none' could score none of the 2 images"):
        try_rewards({"none": none}, lambda *_: True, samples())


def test_rewards_are_tried_on_their_own_tasks() -> None:
    needs_sources = Returning(lambda s: s.sources.mean(dim=(1, 2, 3)) + 1)
    rewards = {"edits": needs_sources, "images": Brightness()}
    asks = lambda name, task: (name == "edits") == (task == "edit")  # noqa: E731
    for kind in (True, False):
        try_rewards(rewards, asks, samples(edit=kind))


@pytest.mark.parametrize("categories", [("plant",), ("a", "a", "b"), tuple("abcdefg")])
def test_prompts_are_of_as_many_categories_as_there_are(categories: tuple[str, ...]) -> None:
    chosen = trial_prompts(table(categories))
    assert 2 <= len(chosen) <= SAMPLES
    assert len(set(chosen.categories)) == min(len(set(categories)), SAMPLES)


def test_the_setting_leaves_it_out(policy, data) -> None:
    trainer = SimpleNamespace(datamodule=data())
    for check in (True, False):
        module = policy("nft", rewards={"mine": Returning(None)}, check_rewards=check)
        if check:
            with pytest.raises(RunStopped, match="Reward 'mine' returned nothing"):
                RewardTrial().on_fit_start(trainer, module)
        else:
            RewardTrial().on_fit_start(trainer, module)
