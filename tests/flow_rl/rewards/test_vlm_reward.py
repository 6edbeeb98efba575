"""The exported scorer: its scores, what they depend on, and what is refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from functools import cache

import pytest
import torch

from flow_rl.rewards import Samples
from flow_rl.rewards.conversation import Question, encode_questions
from flow_rl.rewards.pixels import quantise
from flow_rl.rewards.reading import ReadingSettings, ScoreReader, shared_prefix
from flow_rl.rewards.readout import SCORE_TEMPLATE, expected_score
from flow_rl.rewards.vlm import VLMReward, cast_weights, planned_dtype
from tests.toy_vlm import (
    BRIGHTNESS_RUBRIC,
    CHANGE_RUBRIC,
    WORDS,
    grey,
    rubric,
    toy_data,
    toy_files,
    trained,
    write_rubric,
)


@cache
def reward() -> VLMReward:
    return VLMReward(trained()[1], "brightness", max_outside=1.0)


def samples(count: int = 32) -> Samples:
    images = torch.stack([grey(0.1 + 0.8 * i / count, i) for i in range(count)])
    prompts = ["a square" + " of grey" * (i % 3) for i in range(count)]
    return Samples(images=images, prompts=prompts, categories=["toy"] * count)


def part(whole: Samples, index: list[int]) -> Samples:
    prompts = [whole.prompts[i] for i in index]
    return Samples(images=whole.images[index], prompts=prompts, categories=["toy"] * len(index))


def forced(text: str) -> ScoreReader:
    """A reader whose model writes `text` and nothing else: its logits are planted, its readout is not."""
    module = trained()[0]
    tokenizer = module.processor.tokenizer
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    reader = ScoreReader(module.model, module.processor, ReadingSettings(max_new_tokens=20))
    prefill, step = reader._prefill, {"n": 0}

    class Planted:
        """Stands for the model while it decodes."""

        def __init__(self, model) -> None:
            self.inner = model

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

        def __call__(self, **kwargs):
            output = self.inner(**kwargs)
            step["n"] += 1
            output.logits[:, -1, tokens[min(step["n"], len(tokens) - 1)]] += 1e4
            return output

    def planted_prefill(encoded):
        model, reader.model = reader.model, getattr(reader.model, "inner", reader.model)
        logits, *rest = prefill(encoded)
        reader.model = model
        if "first" not in step:
            step["first"] = True
            logits = logits.clone()
            logits[:, tokens[0]] += 1e4
        return logits, *rest

    reader._prefill, reader.model = planted_prefill, Planted(module.model)
    return reader


def test_scores_follow_what_was_learnt() -> None:
    answers = reward().answers(samples(10))
    assert set(answers.reasoning) <= set(WORDS)
    assert answers.scores[0] + 1.5 < answers.scores[-1]
    assert ((answers.scores >= 1) & (answers.scores <= 5)).all()


@pytest.mark.parametrize("reasoning", [True, False])
def test_batch_of_one_and_of_thirty_two_give_the_same_scores(reasoning: bool) -> None:
    module = trained()[0]
    settings = ReadingSettings(reasoning=reasoning, max_new_tokens=8, max_outside=1.0)
    reader = ScoreReader(module.model, module.processor, settings)
    whole = samples(32)
    pictures = quantise(whole.images)
    asked = [Question(rubric=rubric(), prompt=p, image=i) for p, i in zip(whole.prompts, pictures, strict=True)]
    together = reader.read(asked)
    alone = [reader.read([question]) for question in asked]
    torch.testing.assert_close(together.scores, torch.cat([a.scores for a in alone]), atol=1e-4, rtol=0)
    torch.testing.assert_close(together.outside_mass, torch.cat([a.outside_mass for a in alone]), atol=1e-4, rtol=0)
    assert together.reasoning == tuple(a.reasoning[0] for a in alone)
    assert together.scores.std() > 0.5  # equal scores would prove nothing


def test_score_does_not_depend_on_its_neighbours() -> None:
    whole = samples(8)
    scores = reward().score(whole)
    first = reward().score(part(whole, [0, 7, 7, 7]))[0]
    later = reward().score(part(whole, [5, 6, 0]))[2]
    torch.testing.assert_close(torch.stack([first, later]), scores[0].expand(2), atol=1e-4, rtol=0)
    assert torch.equal(reward().score(whole), scores)


def test_score_equals_plain_transformers_on_the_same_text() -> None:
    """Greedy `generate`, then the readout on a forward of the whole text without a cache: none of our decoding."""
    module = trained()[0]
    model, processor = module.model.eval(), module.processor
    whole = samples(3)
    answers = reward().answers(whole)
    for i in range(3):
        asked = Question(rubric=rubric(), prompt=whole.prompts[i], image=quantise(whole.images[i]))
        encoded = encode_questions(processor, [asked])
        ids = torch.tensor(encoded.input_ids)
        inputs = {**encoded.images, "mm_token_type_ids": (ids == processor.image_token_id).long()}
        written = model.generate(input_ids=ids, **inputs, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        text = processor.tokenizer.decode(written)
        reasoning, _, rest = text.partition(SCORE_TEMPLATE)
        assert reasoning == answers.reasoning[i]
        assert rest[0] in "12345"
        before = processor.tokenizer.encode(reasoning + SCORE_TEMPLATE, add_special_tokens=False)
        full = torch.cat([ids, torch.tensor([before])], dim=1)
        kinds = (full == processor.image_token_id).long()
        with torch.no_grad():
            logits = model(input_ids=full, **encoded.images, mm_token_type_ids=kinds).logits[0, -1]
        score, _ = expected_score(logits, module.reader.digits)
        assert float(score) == pytest.approx(float(answers.scores[i]), abs=1e-4)


def test_answer_without_a_score_line_is_read_after_the_template() -> None:
    question = Question(rubric=rubric(), prompt="a square", image=quantise(grey(0.5, 0)))
    answers = forced("light").read([question, question])
    assert answers.retried.all()
    assert answers.reasoning == ("light", "light")
    module = trained()[0]
    encoded = encode_questions(module.processor, [question])
    ending = module.processor.tokenizer.encode("light" + SCORE_TEMPLATE, add_special_tokens=False)
    full = torch.tensor([encoded.input_ids[0] + ending])
    with torch.no_grad():
        output = module.model(
            input_ids=full, **encoded.images, mm_token_type_ids=(full == module.processor.image_token_id).long()
        )
    score, _ = expected_score(output.logits[0, -1], module.reader.digits)
    torch.testing.assert_close(answers.scores, score.expand(2), atol=1e-4, rtol=0)


def test_belief_outside_of_the_digits_gives_no_score() -> None:
    module = trained()[0]
    question = Question(rubric=rubric(), prompt="a square", image=quantise(grey(0.5, 0)))
    mass = float(module.reader.read([question]).outside_mass[0])
    strict = ReadingSettings(max_new_tokens=8, max_outside=mass * 0.99)
    answers = ScoreReader(module.model, module.processor, strict).read([question])
    assert answers.scores.isnan().all()
    assert not answers.parsed.any()


def test_cap_is_applied_to_the_stated_failure_and_can_be_switched_off() -> None:
    capped = rubric(text="How bright is it? light is capped.", cap_phrase="light", cap_score=2)
    question = Question(rubric=capped, prompt="a square", image=quantise(grey(0.95, 0)))
    answers = forced("light\nScore: 5").read([question])
    assert answers.reasoning == ("light",)
    assert float(answers.scores[0]) == 2.0
    reader = forced("light\nScore: 5")
    reader.settings = ReadingSettings(max_new_tokens=20, cap=False)
    assert float(reader.read([question]).scores[0]) > 4.9


def test_image_that_is_not_finite_gets_no_score() -> None:
    whole = samples(3)
    whole.images[1, 0, 0, 0] = float("nan")
    scores = reward().score(whole)
    assert scores.isnan().tolist() == [False, True, False]


def test_statistics_count_what_was_scored() -> None:
    fresh = VLMReward(trained()[1], "brightness", reasoning=False, batch_size=4)
    assert fresh.statistics() == {}
    fresh.score(samples(6))
    found = fresh.statistics()
    assert found["parse_rate"] == 1.0
    assert found["retry_rate"] == 0.0
    assert 0 <= found["outside_mass"] < 0.5
    assert found["reasoning_length"] == 0.0
    assert fresh.statistics() == {}  # told once
    reward().statistics()
    written = reward().answers(samples(6)).reasoning
    assert reward().statistics()["reasoning_length"] == pytest.approx(sum(map(len, written)) / 6)
    assert any(written)


def test_export_gives_the_scores_of_the_modules_validation() -> None:
    module, _, _ = trained()
    known = toy_data().validation
    loaded = [a.load() for a in known]
    reader = ScoreReader(module.model, module.processor, ReadingSettings(max_new_tokens=8, max_outside=1.0))
    expected = reader.read(module.questions(loaded))
    images = torch.stack([e.image for e in loaded]).float() / 255
    scores = reward().score(Samples(images=images, prompts=[a.prompt for a in known], categories=["toy"] * len(known)))
    torch.testing.assert_close(scores, expected.scores, atol=1e-4, rtol=0)


def test_rubric_with_another_hash_is_refused_and_both_hashes_are_named(tmp_path) -> None:
    path = trained()[1]
    VLMReward(path, "brightness", rubric=toy_files()["brightness"])
    changed = write_rubric(tmp_path, BRIGHTNESS_RUBRIC | {"text": "How dark is it?"})
    with pytest.raises(ValueError, match="trained with the rubric") as caught:
        VLMReward(path, "brightness", rubric=changed)
    assert rubric().hash in str(caught.value)
    assert rubric(text="How dark is it?").hash in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda spec: spec["rubrics"]["brightness"].update(text="How dark is it?"), "changed after the export"),
        (lambda spec: spec.update(format=0), "not of format 1"),
        (lambda spec: spec.pop("readout"), "incomplete or damaged"),
        (lambda spec: spec["readout"]["digit_token_ids"].reverse(), "do not belong together"),
    ],
)
def test_damaged_export_is_refused(tmp_path, edit, message: str) -> None:
    shutil.copytree(trained()[1], tmp_path / "export")
    file = tmp_path / "export" / "reward.json"
    spec = json.loads(file.read_text())
    edit(spec)
    file.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=message):
        VLMReward(str(tmp_path / "export"), "brightness")


def test_wrong_directory_dimension_or_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has no reward\.json"):
        VLMReward(toy_files()["model"], "brightness")
    with pytest.raises(ValueError, match="Did you mean 'brightness'"):
        VLMReward(trained()[1], "brightnes")
    with pytest.raises(ValueError, match="no source images"):
        VLMReward(trained()[1], "change").score(samples(2))


def test_shared_prefix_stops_at_the_first_difference_image_or_end() -> None:
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 5, 4]], stop=9) == 2
    assert shared_prefix([[1, 2, 9, 4], [1, 2, 9, 5]], stop=9) == 2
    assert shared_prefix([[1, 2, 3], [1, 2, 3, 4]], stop=9) == 2  # something is left to feed
    assert shared_prefix([[1, 2, 3]], stop=9) == 2
    assert shared_prefix([[1, 2], [3, 2]], stop=9) == 0


def test_edit_scores_depend_on_the_source(tmp_path) -> None:
    scorer = VLMReward(trained()[1], "change", reasoning=False, max_outside=1.0)
    assert scorer.rubric.hash == rubric(**CHANGE_RUBRIC).hash
    image = torch.stack([grey(0.5, 0)] * 2)
    sources = torch.stack([grey(0.1, 1), grey(0.9, 2)])
    made = Samples(images=image, prompts=["brighter"] * 2, categories=["edit"] * 2, sources=sources)
    scores = scorer.score(made)
    assert scores[0] != scores[1]


def test_sharing_the_prefix_changes_no_score(monkeypatch) -> None:
    whole = samples(6)
    shared = reward().answers(whole)
    monkeypatch.setattr("flow_rl.rewards.reading.shared_prefix", lambda _rows, stop: 0)
    apart = reward().answers(whole)
    torch.testing.assert_close(shared.scores, apart.scores, atol=1e-4, rtol=0)
    assert shared.reasoning == apart.reasoning


def test_weights_are_in_bfloat16_on_a_gpu_alone() -> None:
    assert planned_dtype("auto", on_gpu=True) == torch.bfloat16
    assert planned_dtype("auto", on_gpu=False) == torch.float32
    assert planned_dtype("float32", on_gpu=True) == torch.float32
    automatic = VLMReward(trained()[1], "brightness", max_outside=1.0)
    plain = VLMReward(trained()[1], "brightness", max_outside=1.0, dtype="float32")
    before = automatic.fingerprint()
    assert torch.equal(automatic.score(samples(4)), plain.score(samples(4)))
    assert automatic.fingerprint() == before
    assert automatic.fingerprint() != plain.fingerprint()
    assert {p.dtype for p in automatic.reader.model.parameters()} == {torch.float32}


def test_rewards_on_one_export_share_a_model_with_their_own_reading(tmp_path) -> None:
    path = shutil.copytree(trained()[1], tmp_path / "export")
    first, second = (
        VLMReward(str(path), name, reasoning=reasoning, max_outside=1.0)
        for name, reasoning in (("brightness", True), ("change", False))
    )
    assert first.reader.model is second.reader.model
    assert (first.reader.settings.reasoning, second.reader.settings.reasoning) == (True, False)
    assert VLMReward(str(path), "brightness", dtype="float32").reader.model is not first.reader.model
    assert VLMReward(str(path), "brightness", device="cpu").reader.model is not first.reader.model
    alone = reward().score(samples(4))
    torch.testing.assert_close(first.score(samples(4)), alone, atol=1e-4, rtol=0)
    weights = path / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # another export in the same place
    assert VLMReward(str(path), "brightness").reader.model is not first.reader.model


def test_a_model_that_no_reward_holds_leaves_the_memory(tmp_path) -> None:
    path = shutil.copytree(trained()[1], tmp_path / "export")
    model = weakref.ref(VLMReward(str(path), "brightness").reader.model)
    gc.collect()
    assert model() is None


def test_casting_keeps_the_precision_of_buffers() -> None:
    layer = torch.nn.BatchNorm1d(3)
    cast_weights(layer, torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    assert layer.num_batches_tracked.dtype == torch.int64
