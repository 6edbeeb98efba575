from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration

from flow_rl.models.tiny.vision_language import build_vlm, build_vlm_tokenizer
from flow_rl.rewards.readout import digit_token_ids

TEXTS = ["a person with round glasses, says K T", "Score: 1 2 3 4 5", "system user assistant Prompt: Image:"]


@pytest.fixture(scope="module")
def built() -> tuple:
    return build_vlm(build_vlm_tokenizer(TEXTS))


def test_it_is_small_and_survives_plain_transformers(built: tuple, tmp_path: Path) -> None:
    model, processor = built
    assert sum(p.numel() for p in model.parameters()) <= 6_000_000
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 12e6
    loaded, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen3VLForConditionalGeneration)
    message = [{"role": "user", "content": [{"type": "text", "text": "glasses"}, {"type": "image"}]}]
    text = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    image = torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inputs = [p(text=[text], images=[image], return_tensors="pt") for p in (processor, reader)]
    assert (inputs[0]["input_ids"] == model.config.image_token_id).sum() == 16
    with torch.no_grad():
        ours, theirs = model(**inputs[0]).logits, loaded.eval()(**inputs[1]).logits
    torch.testing.assert_close(ours, theirs)
    blank = processor(text=[text], images=[torch.zeros_like(image)], return_tensors="pt")
    with torch.no_grad():
        assert (model(**blank).logits - ours).abs().max() > 1e-3  # it looks


def test_words_digits_and_letters_are_single_tokens(built: tuple) -> None:
    tokenizer = built[1].tokenizer
    assert len(set(digit_token_ids(tokenizer))) == 5
    for word in (" glasses", " person", " K", " T", "Score", "Prompt"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    assert tokenizer.decode(tokenizer.encode("round glasses: no\nScore: 4")) == "round glasses: no\nScore: 4"


def test_weights_are_a_function_of_the_seed(built: tuple) -> None:
    state = torch.random.get_rng_state()
    same, other = (build_vlm(built[1].tokenizer, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    weight = built[0].lm_head.weight
    assert torch.equal(same.lm_head.weight, weight)
    assert not torch.equal(other.lm_head.weight, weight)
