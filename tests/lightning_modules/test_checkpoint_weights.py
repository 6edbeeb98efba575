"""What a checkpoint's evaluation computes with, what a trial run leaves, and what diffusers makes of an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImage21Pipeline
from lightning import Trainer
from safetensors.torch import load_file, save_file

from callbacks import ExportModel, RunCheckpoint, WeightEMA
from flow_rl.models import load_image_model
from flow_rl.models.adapter_files import ADAPTER_FILE
from flow_rl.models.adapters import LoraSettings, add_lora, merged_copy, save_adapter
from flow_rl.models.base_digest import base_digests

LORA = LoraSettings(rank=4, alpha=24)


def trainer(directory: Path, *callbacks, **changes) -> Trainer:
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings |= {"accelerator": "cpu", "max_steps": 2, "limit_val_batches": 0, "logger": False}
    return Trainer(default_root_dir=directory, callbacks=list(callbacks), **settings | changes)


def weights(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("weights_only", [False, True])
def test_evaluation_uses_the_average_as_the_export_does(policy, data, tmp_path, weights_only) -> None:
    module, ema = policy("nft", lora=LORA), WeightEMA(decay=0.5)
    keeper = RunCheckpoint(
        dirpath=tmp_path, every_n_train_steps=2, save_last="link", save_top_k=1, save_weights_only=weights_only
    )
    trainer(tmp_path, ema, keeper).fit(module, data())
    average, raw = ema.shadow.state_dict(), weights(module)
    assert not all(torch.equal(average[name], raw[name]) for name in raw)
    evaluated = policy("nft", lora=LORA)
    trainer(tmp_path).validate(evaluated, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert all(torch.equal(average[name], tensor) for name, tensor in weights(evaluated).items())
    for other, words in ((None, "no adapter"), (LoraSettings(rank=4, alpha=8), "alpha=24")):
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path).validate(policy("nft", lora=other), data(), ckpt_path=tmp_path / "last.ckpt")


def test_a_trial_run_writes_nothing(policy, data, tmp_path) -> None:
    keeper = RunCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=1, save_last="link")
    callbacks = (WeightEMA(decay=0.5), ExportModel(str(tmp_path / "export")), keeper)
    trainer(tmp_path, *callbacks, fast_dev_run=True, limit_val_batches=1).fit(policy("nft"), data())
    assert sorted(tmp_path.rglob("*")) == []


def test_a_base_is_known_by_its_content(tiny_path, tmp_path) -> None:
    found = base_digests(tiny_path)
    assert found.keys() == {"transformer", "text_encoder", "vae"}
    copy = Path(shutil.copytree(tiny_path, tmp_path / "copy"))
    assert base_digests(copy) == found
    [file] = (copy / "vae").glob("*.safetensors")
    state = load_file(file)
    state[min(state)] = state[min(state)] + 1
    save_file(state, file, metadata={"format": "pt"})
    changed = base_digests(copy)
    assert changed.pop("vae") != found["vae"]
    assert changed.items() <= found.items()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=str(file)):
        base_digests(copy)


def test_diffusers_loads_an_adapter_as_strong_as_the_merged_model(tiny_path, tmp_path) -> None:
    model = load_image_model(tiny_path, image_size=(32, 32))
    add_lora(model.transformer, **vars(LORA), targets=model.lora_targets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_adapter(model.transformer, tmp_path)
    expected = merged_copy(model.transformer).state_dict()
    for load in ("pipeline", "transformer", "transformer's own names"):
        pipe = QwenImage21Pipeline.from_pretrained(tiny_path)
        named = {"weight_name": ADAPTER_FILE, "use_safetensors": True}
        if load == "pipeline":
            pipe.load_lora_weights(str(tmp_path), **named)
        else:
            prefix = "transformer" if load == "transformer" else None
            pipe.transformer.load_lora_adapter(str(tmp_path), prefix=prefix, **named)
        pipe.transformer.fuse_lora()
        found = {n.replace(".base_layer", ""): t for n, t in pipe.transformer.state_dict().items() if ".lora_" not in n}
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)
