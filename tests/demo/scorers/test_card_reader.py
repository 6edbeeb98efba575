from __future__ import annotations

import numpy as np
import torch
from jsonargparse import ArgumentParser

from demo.scorers.ocr import CardReader, requested_letters
from demo.world.captions import caption
from demo.world.world import make_scene, render
from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.ocr import OCRReward


def _cards(count: int) -> tuple[Samples, list[str]]:
    scenes = [make_scene(808, i, split="test", category="typography") for i in range(count)]
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    prompts = [caption(scene, 8, i) for i, scene in enumerate(scenes)]
    texts = [scene.attributes["text"] for scene in scenes]
    return Samples(images=images, prompts=prompts, categories=["typography"] * count), texts


def test_cards_are_read_and_scored() -> None:
    samples, texts = _cards(40)
    reader = CardReader()
    assert reader.read(samples.images) == texts
    assert [requested_letters(prompt) for prompt in samples.prompts] == texts
    reward = OCRReward(reader, extractor=requested_letters)
    assert reward.score(samples).eq(5).all()
    # One letter too many, of three: the distance is 1 of 4.
    row = next(i for i, text in enumerate(texts) if len(text) == 3)
    prompt = f"a card that says {' '.join(texts[row] + ('A' if texts[row][-1] != 'A' else 'B'))}"
    longer = Samples(images=samples.images[row : row + 1], prompts=[prompt], categories=["typography"])
    assert reward.score(longer).item() == 4


def test_an_empty_card_reads_as_nothing_and_other_prompts_are_masked() -> None:
    generator = torch.Generator().manual_seed(0)
    empty = 0.95 + 0.02 * torch.randn(3, 3, 32, 32, generator=generator)
    assert CardReader().read(empty.clamp(0, 1)) == ["", "", ""]
    prompts = ["a card that says K T", "a potted cactus", "not a caption of this world"]
    samples = Samples(images=empty, prompts=prompts, categories=["typography", "plant", "general"])
    scores = OCRReward(CardReader(), extractor=requested_letters).score(samples)
    assert scores[0] == 1
    assert scores[1:].isnan().all()


def test_a_config_builds_the_reward() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    config = {
        "class_path": "flow_rl.rewards.ocr.OCRReward",
        "init_args": {
            "reader": {"class_path": "demo.scorers.ocr.CardReader"},
            "extractor": "demo.scorers.ocr.requested_letters",
        },
    }
    reward = parser.instantiate_classes(parser.parse_object({"reward": config})).reward
    samples, _ = _cards(3)
    assert reward.score(samples).eq(5).all()
