"""The same path through Qwen2.5-VL: its class, its rotary positions, its window attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from flow_rl.models.adapters import LoraSettings
from flow_rl.models.vision_language import load_vlm
from flow_rl.rewards.conversation import Question
from flow_rl.rewards.finetune_settings import RewardObjective
from flow_rl.rewards.pixels import quantise
from flow_rl.rewards.reading import ReadingSettings, ScoreReader
from tests.toy_vlm import grey, rubric, toy_data, toy_files, toy_module, toy_trainer


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    directory: Path = tmp_path_factory.mktemp("qwen25") / "model"
    processor = load_vlm(toy_files()["model"])[1]
    token = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": processor.tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32, "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(directory)
    Qwen2_5_VLProcessor(
        image_processor=processor.image_processor,
        tokenizer=AutoTokenizer.from_pretrained(toy_files()["model"]),
        video_processor=processor.video_processor,
        chat_template=processor.chat_template,
    ).save_pretrained(directory)
    return str(directory)


def test_batches_and_plain_generation_agree(path: str) -> None:
    model, processor = load_vlm(path)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    pictures = [quantise(grey(0.2 * i, i)) for i in range(4)]
    asked = [Question(rubric=rubric(), prompt="a square" + " of grey" * i, image=p) for i, p in enumerate(pictures)]
    for reasoning in (True, False):
        reader = ScoreReader(model, processor, ReadingSettings(reasoning=reasoning, max_new_tokens=6, max_outside=1.0))
        together = reader.read(asked)
        alone = torch.cat([reader.read([question]).scores for question in asked])
        torch.testing.assert_close(together.scores, alone, atol=1e-4, rtol=0)


def test_adapter_trains_and_exports(path: str, tmp_path) -> None:
    module = toy_module(
        model_path=path,
        lora=LoraSettings(rank=2, alpha=4),
        objective=RewardObjective(direct_share=1.0),
        reading=ReadingSettings(reasoning=False, max_outside=1.0),
    )
    toy_trainer(2).fit(module, toy_data(batch_size=4))
    adapted = {n.split(".lora_")[0] for n, p in module.model.named_parameters() if "lora_B" in n and p.abs().max() > 0}
    assert any("visual" in name for name in adapted)
    assert any("language_model" in name for name in adapted)
    module.export(tmp_path / "export")
    asked = module.questions([a.load() for a in toy_data().validation[:4]])
    expected = module.reader.read(asked).scores
    module.reader.model = load_vlm(tmp_path / "export")[0]
    torch.testing.assert_close(module.reader.read(asked).scores, expected, atol=1e-4, rtol=0)
