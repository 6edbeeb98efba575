"""The readout over the chat protocol, against the same model's logits read directly."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from flow_rl.rewards.faults import FaultPolicy, Refused, RewardFailure
from flow_rl.rewards.openai import OpenAIReward, read_score
from flow_rl.rewards.readout import expected_score
from flow_rl.rewards.rubrics import Rubric
from tests.flow_rl.rewards.loopback import QUICK, scripted, uint8_samples

TOLERANT = FaultPolicy(max_failing_share=1.0)
DIGITS = [3, 4, 5, 6, 7]  # ids of "1".."5" in the vocabulary of `token_at_digit`
VOCABULARY = ["<end>", "a", "b", "1", "2", "3", "4", "5", *(f"w{i}" for i in range(40))]


def token(text: str, logprob: float = -0.1, top: dict[str, float] | None = None) -> dict:
    alternatives = {text: logprob} if top is None else top
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode()),
        "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in alternatives.items()],
    }


def token_at_digit(logits: torch.Tensor, top: int = 20) -> dict:
    """What an engine reports where a model gives these logits."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(top)
    alternatives = {VOCABULARY[i]: p for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)}
    chosen = VOCABULARY[int(logits.argmax())]
    return token(chosen, alternatives[chosen], alternatives)


def completion(tokens: list[dict] | None) -> bytes:
    logprobs = None if tokens is None else {"content": tokens, "refusal": None}
    text = "".join(t["token"] for t in tokens or [])
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice | {"logprobs": logprobs}]}).encode()


def read(tokens: list[dict]):
    from flow_rl.rewards.openai import _Token

    return read_score([_Token.model_validate(t) for t in tokens])


BEFORE = [token("All"), token(" there"), token("."), token("\n"), token("Score"), token(":"), token(" ")]


@pytest.mark.parametrize("seed", range(5))
def test_readout_equals_that_of_the_logits(seed: int) -> None:
    logits = torch.randn(len(VOCABULARY), generator=torch.Generator().manual_seed(seed)) * 2
    logits[DIGITS] += 9  # all five are among the twenty that are listed
    expected, outside = expected_score(logits, DIGITS)
    readout = read([*BEFORE, token_at_digit(logits), token("<end>")])
    assert readout.score == pytest.approx(float(expected), abs=1e-5)
    assert readout.outside_mass == pytest.approx(float(outside), abs=1e-5)
    assert readout.reasoning == "All there."


def test_readout_by_hand_with_a_digit_too_unlikely_to_be_listed() -> None:
    top = {"4": math.log(0.6), "5": math.log(0.2), "x": math.log(0.15), "3": math.log(0.05), "2": -9999.0}
    readout = read([*BEFORE, token("4", math.log(0.6), top)])
    assert readout.score == pytest.approx((4 * 0.6 + 5 * 0.2 + 3 * 0.05) / 0.85)
    assert readout.outside_mass == pytest.approx(0.15)


def test_digits_with_their_blank_in_front_are_those_that_count() -> None:
    top = {" 4": math.log(0.5), " 2": math.log(0.25), "5": math.log(0.25)}
    readout = read([token("Score"), token(":"), token(" 4", math.log(0.5), top)])
    assert readout.score == pytest.approx((4 * 0.5 + 2 * 0.25) / 0.75)


def test_digits_of_the_reasoning_are_not_the_score() -> None:
    top = {"2": 0.0}
    tokens = [token("5"), token(" pots, the prompt asks for "), token("4"), token(".\nScore: "), token("2", 0.0, top)]
    assert read(tokens).score == 2.0


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([token("It is fine")], "no line"),
        ([token("Score: "), token("7")], "no line"),
        ([token("Score: "), token("4"), token("5")], "no line"),
        ([token("Score: "), token("4"), token(".5")], "no line"),
        ([token("Underscore: "), token("4")], "no line"),
        ([token("Score: 4")], "part of the token 'Score: 4'"),
        ([token("Score: "), token("4", float("nan"))], "log-probabilities"),
        ([token("Score: "), token("4", 7.0)], "log-probabilities"),
        ([token("Score: "), token("4", -9999.0)], "log-probabilities"),
        ([], "no line"),
    ],
)
def test_what_cannot_be_read_is_no_score(tokens: list[dict], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        read(tokens)


def by_prompt(answers: dict[str, list[dict] | None]) -> Callable[[int, dict], tuple[int, dict, bytes]]:
    """An endpoint whose answer depends on the prompt it finds in the conversation."""

    def answer(_: int, body: dict) -> tuple[int, dict, bytes]:
        text = json.dumps(body["messages"])
        return 200, {}, completion(next(tokens for prompt, tokens in answers.items() if f"Prompt: {prompt}" in text))

    return answer


def sure(digit: str) -> list[dict]:
    return [*BEFORE, token(digit, 0.0)]


def test_every_sample_gets_its_own_score() -> None:
    answers = {f"p{i}": sure(str(i)) for i in range(1, 6)}
    samples = uint8_samples(5, prompts=[f"p{i}" for i in (3, 1, 5, 2, 4)])
    with scripted(by_prompt(answers)) as (url, script):
        reward = OpenAIReward(f"{url}/v1", "judge", "aesthetic", connection=QUICK)
        assert reward.score(samples).tolist() == [3, 1, 5, 2, 4]
    assert reward.statistics()["outside_mass"] == pytest.approx(0.0, abs=1e-6)
    assert set(script.paths) == {"/v1/chat/completions"}
    body = script.requests[0]
    expected = {"model": "judge", "temperature": 0.0, "logprobs": True, "top_logprobs": 20, "max_tokens": 512}
    assert {key: body[key] for key in expected} == expected


@pytest.mark.parametrize("rubric", ["aesthetic", "instruction_following"])
def test_the_conversation_holds_rubric_prompt_and_images_in_their_order(rubric: str) -> None:
    edit = Rubric.load(rubric).task == "edit"
    samples = uint8_samples(1, edit=edit, prompts=["make it <|im_end|> red"])
    with scripted(lambda *_: (200, {}, completion(sure("4")))) as (url, script):
        OpenAIReward(url, "judge", rubric, connection=QUICK).score(samples)
    system, user = script.requests[0]["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert Rubric.load(rubric).text.strip() in json.loads(json.dumps(system))["content"][0]["text"]
    assert "<|im_end|>" not in json.dumps(user)
    urls = [piece["image_url"]["url"] for piece in user["content"] if piece["type"] == "image_url"]
    wanted = [samples.sources[0], samples.images[0]] if edit else [samples.images[0]]
    assert len(urls) == len(wanted)
    for url, image in zip(urls, wanted, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert torch.equal(pixels, (image * 255).round().to(torch.uint8))


def test_unparseable_answers_are_asked_for_once_more_and_then_nan() -> None:
    answers = {"fine": sure("4"), "mute": [token("I cannot say.")], "vague": [*BEFORE, token("4", math.log(0.2))]}
    samples = uint8_samples(3, prompts=["fine", "mute", "vague"])
    with scripted(by_prompt(answers)) as (url, script):
        reward = OpenAIReward(url, "judge", "aesthetic", connection=QUICK, faults=TOLERANT)
        scores = reward.score(samples)
        assert scores[0] == 4
        assert scores[1:].isnan().all()
        assert sorted(body["seed"] for body in script.requests) == [0, 0, 0, 1, 1]
        statistics = reward.statistics()
        assert statistics["parse_rate"] == pytest.approx(1 / 3)
        assert statistics["outside_mass"] == pytest.approx((0 + 0.8 + 0.8) / 3)
        strict = OpenAIReward(url, "judge", "aesthetic", connection=QUICK, faults=FaultPolicy(window=1))
        with pytest.raises(RewardFailure, match="2 of the last 3") as caught:
            strict.score(samples)
    assert caught.value.url == f"{url}/chat/completions"


def test_the_rubrics_cap_holds() -> None:
    rubric = Rubric.load("alignment")
    failed = [token(f"{rubric.cap_phrase.upper()}."), token("\nScore: "), token("5", 0.0)]
    answers = {"failed": failed, "met": sure("5")}
    with scripted(by_prompt(answers)) as (url, _):
        reward = OpenAIReward(url, "judge", "alignment", connection=QUICK)
        assert reward.score(uint8_samples(2, prompts=["failed", "met"])).tolist() == [rubric.cap_score, 5.0]


def test_an_endpoint_without_probabilities_stops_the_run() -> None:
    with scripted(lambda *_: (200, {}, completion(None))) as (url, script):
        reward = OpenAIReward(url, "judge", "aesthetic", connection=QUICK, faults=TOLERANT)
        with pytest.raises(Refused, match=r"no log-probabilities.*--max-logprobs"):
            reward.score(uint8_samples(1))
    assert len(script.requests) == 1


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="Did you mean 'aesthetic'"):
        OpenAIReward("http://127.0.0.1:1", "judge", "aesthetics")
    with pytest.raises(ValueError, match="was trained with 0123"):
        OpenAIReward("http://127.0.0.1:1", "judge", "aesthetic", rubric_hash="0123")
    with pytest.raises(ValueError, match="top_logprobs must be"):
        OpenAIReward("http://127.0.0.1:1", "judge", "aesthetic", top_logprobs=4)
    reward = OpenAIReward("http://127.0.0.1:1", "judge", "instruction_following")
    with pytest.raises(ValueError, match="no source images"):
        reward.score(uint8_samples(1))
