from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.ocr import OCRReader, OCRReward, quoted_text, text_similarity
from flow_rl.rewards.rapidocr import RapidOCRReader


class Scripted(OCRReader):
    """Reads text i from an image whose first value is i / 100."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.seen: list[int] = []

    def read(self, images: torch.Tensor) -> list[str]:
        keys = (images[:, 0, 0, 0] * 100).round().int().tolist()
        self.seen += keys
        return [self.texts[key] for key in keys]


def _samples(prompts: list[str]) -> Samples:
    images = (torch.arange(len(prompts)) / 100).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    return Samples(images=images, prompts=prompts, categories=["typography"] * len(prompts))


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says “Grand  Opening” today", "Grand  Opening"),
        ("a mug with the word 'coffee' on it", "coffee"),
        ("a shop with ‘Joe’s’ above the door", "Joe’s"),
        ("a badge with 'it's me' on it", "it's me"),
        ("a banner „Willkommen“, a flag «Bienvenue»", "Willkommen Bienvenue"),
        ("店门上写着「欢迎光临」", "欢迎光临"),
        ("a dog that doesn't bark, and the dogs' bowl", None),
        ('an empty pair of quotes ""', None),
        ("a red balloon", None),
    ],
)
def test_quoted_text(prompt: str, text: str | None) -> None:
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    ("requested", "read", "distance"),
    # Textbook distances, and one of each operation.
    [
        ("kitten", "sitting", 3),
        ("saturday", "sunday", 3),
        ("open", "open", 0),
        ("open", "", 4),
        ("", "ab", 2),
        ("open", "opn", 1),
        ("open", "opens", 1),
        ("open", "oben", 1),
        ("ab", "ba", 2),
    ],
)
def test_similarity_is_one_minus_the_normalised_edit_distance(requested: str, read: str, distance: int) -> None:
    expected = 1 - distance / max(len(requested), len(read))
    assert text_similarity(requested, read) == pytest.approx(expected)
    assert text_similarity(read, requested) == pytest.approx(expected)


def test_scores_and_masks() -> None:
    texts = ["OPEN", "o p\ne n", "OPENED", "", "xyz", "unread", "ＯＰＥＮ", "unread"]
    reader = Scripted(texts)
    samples = _samples(['says "OPEN"'] * 5 + ["says nothing"] + ['says "OPEN"'] * 2)
    samples.images[7, 1, 2, 2] = torch.nan
    reward = OCRReward(reader)
    assert isinstance(reward, Reward)
    scores = reward.score(samples)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores, [5, 5, 1 + 4 * 4 / 6, 1, 1, np.nan, 5, np.nan], atol=1e-5)
    assert reader.seen == [0, 1, 2, 3, 4, 6]  # what asks for no text is not read
    strict = OCRReward(reader, case_sensitive=True).score(samples)
    np.testing.assert_allclose(strict[:2], [5, 1], atol=1e-5)


def test_a_users_extractor_decides_what_is_asked_for() -> None:
    reward = OCRReward(Scripted(["blue", "blue"]), extractor=lambda prompt: prompt.partition("text: ")[2] or None)
    scores = reward.score(_samples(["text: blur", 'a "quoted" word']))
    np.testing.assert_allclose(scores, [4, np.nan], atol=1e-5)


def test_nothing_to_read_reads_nothing() -> None:
    reader = Scripted([])
    assert OCRReward(reader).score(_samples(["a cat", "a dog"])).isnan().all()
    assert reader.seen == []


def test_rapidocr_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install rapidocr-onnxruntime==1\.4\.4"):
        RapidOCRReader()
    with pytest.raises(ValueError, match=r"received 320 and 1\.5"):
        RapidOCRReader(min_confidence=1.5)


def test_rapidocr_gets_large_blue_first_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class RapidOCR:
        def __init__(self, text_score: float) -> None:
            assert text_score == 0.25

        def __call__(self, image: np.ndarray) -> tuple[list | None, list]:
            assert image.dtype == np.uint8
            assert image.shape == (120, 180, 3)
            if image[60, 90].tolist() == [0, 128, 255]:
                return [[None, "one", 0.9], [None, "two", 0.8]], []
            return None, []

    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", types.SimpleNamespace(RapidOCR=RapidOCR))
    images = torch.zeros(2, 3, 40, 60)
    images[0] = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)
    assert RapidOCRReader(min_side=100, min_confidence=0.25).read(images) == ["one\ntwo", ""]


def test_rapidocr_reads_small_words() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="needs the optional extra rapidocr-onnxruntime")
    words = ["HELLO", "rocket", "SALE 50", "Berlin"]
    pixels = []
    for word in words:
        canvas = Image.new("RGB", (96, 64), "white")
        ImageDraw.Draw(canvas).text((10, 20), word, fill="navy", font=ImageFont.load_default(size=16))
        pixels.append(np.array(canvas))
    images = torch.from_numpy(np.stack([*pixels, np.full((64, 96, 3), 255, np.uint8)])).permute(0, 3, 1, 2) / 255
    prompts = [f'a card that says "{word}"' for word in [*words, "HELLO"]]
    samples = Samples(images=images, prompts=prompts, categories=["typography"] * 5)
    scores = OCRReward(RapidOCRReader()).score(samples)
    assert scores[:4].min() > 4.5
    assert scores[4] == 1
