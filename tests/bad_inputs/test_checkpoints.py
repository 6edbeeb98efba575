"""Bad checkpoints and adapters: one message says what was received, where, and what to do; no code of theirs runs."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter

from cli.start_checks import check_checkpoint
from flow_rl.models.adapter_files import load_factors, read_layers
from flow_rl.models.adapters import LoraSettings, check_adapter
from lightning_modules.checkpoint_identity import KEY, averaged_weights, check_belongs, check_names, describe
from strategies.checkpoint_files import META, write_meta
from strategies.checkpoint_files import save_file as save_checkpoint
from strategies.checkpoint_reading import read_description
from strategies.checkpoints import AtomicCheckpointIO, load_shards

LAYER = "blocks.0.to_q"
TOUCHED: list[str] = []


class Evil:
    """Runs when it is unpickled."""

    def __init__(self, function: Callable, argument: object) -> None:
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


def touch(name: str) -> None:
    TOUCHED.append(name)


def good(path: Path) -> Path:
    save_checkpoint({"state_dict": {"w": torch.arange(4096.0)}, KEY: {}}, path)
    return path


def damaged(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(good(path).read_bytes()))
    return path


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 64]) + content[middle + 64 :]


def pickled(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def shards(path: Path) -> Path:
    path.mkdir()
    dcp.save({"w": torch.arange(64.0)}, storage_writer=FileSystemWriter(path), no_dist=True)
    write_meta(path, {"state_dict": {}, KEY: {}})
    return path


def with_table(path: Path, content: object) -> Path:
    (shards(path) / ".metadata").write_bytes(pickle.dumps(content))
    return path


def with_shard(path: Path, change: Callable[[bytes], bytes] | None) -> Path:
    [file] = shards(path).glob("*.distcp")
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    return path


def linked(path: Path) -> Path:
    path.symlink_to("gone.ckpt")
    return path


def unfinished(path: Path) -> Path:
    (shards(path) / META).unlink()
    return path


def evil_state(function: Callable, argument: object) -> dict:
    return {"state_dict": {}, "x": Evil(function, argument)}


#: what is given, and words of the message
CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p, "No checkpoint"),
    "link to nothing": (linked, "gone.ckpt"),
    "empty file": (lambda p: raw(p, b""), "0 bytes"),
    "text": (lambda p: raw(p, b"model: {}\n"), "is no complete checkpoint"),
    "page of a hub": (lambda p: raw(p, b"<!DOCTYPE html>" * 99), "is not a checkpoint"),
    "pointer of Git LFS": (lambda p: raw(p, b"version https://git-lfs.github.com/spec/v1\n"), "cut short"),
    "first half": (lambda p: damaged(p, lambda c: c[: len(c) // 2]), "cut short"),
    "last byte gone": (lambda p: damaged(p, lambda c: c[:-60]), "cut short"),
    "second half": (lambda p: damaged(p, lambda c: c[len(c) // 2 :]), "no complete checkpoint"),
    "zeros at the end": (lambda p: damaged(p, lambda c: c[: len(c) // 2] + bytes(len(c) // 2)), "cut short"),
    "64 bytes inverted": (lambda p: damaged(p, flipped), "does not match"),
    "pickle of old torch": (lambda p: raw(p, pickle.dumps({"state_dict": {}})), "not a checkpoint"),
    "runs a command": (lambda p: pickled(p, evil_state(os.system, "true")), "system"),
    "runs python": (lambda p: pickled(p, evil_state(eval, "1")), "eval"),
    "runs a module's function": (lambda p: pickled(p, evil_state(touch, "x")), "touch"),
    "opens a file": (lambda p: pickled(p, evil_state(open, "x")), "open"),
    "object of a class": (lambda p: pickled(p, {"state_dict": {}, "x": SimpleNamespace()}), "SimpleNamespace"),
    "a path": (lambda p: pickled(p, {"state_dict": {}, "x": Path("x")}), "Path"),
    "no state": (lambda p: pickled(p, {"model": {}}), "no 'state_dict'"),
    "a list": (lambda p: pickled(p, [1, 2]), "no 'state_dict'"),
    "a tensor": (lambda p: pickled(p, torch.zeros(2)), "no 'state_dict'"),
    "folder without an end": (unfinished, "written last"),
    "empty folder": (lambda p: (p.mkdir(), p)[1], "cut short"),
    "shards whose table runs a command": (lambda p: with_table(p, Evil(os.system, "true")), "system"),
    "shards whose table runs python": (lambda p: with_table(p, Evil(touch, "table")), "touch"),
    "shards whose table is a list": (lambda p: with_table(p, []), "not the table"),
    "a shard is gone": (lambda p: with_shard(p, None), "is gone"),
    "a shard is cut short": (lambda p: with_shard(p, lambda c: c[:100]), "cut short"),
    "a shard is changed": (
        lambda p: with_shard(p, lambda c: c.replace(torch.arange(64.0).numpy().tobytes(), bytes(256))),
        "does not match",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    make, words = CHECKPOINTS[name]
    path = make(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt") as error:
        read_description(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    if "no 'state_dict'" not in words:  # what is no state for a training is still plain values
        with pytest.raises(ValueError, match=r"a\.ckpt"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not TOUCHED


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    assert torch.equal(read_description(good(tmp_path / "a.ckpt"))["state_dict"]["w"], torch.arange(4096.0))
    assert read_description(shards(tmp_path / "b.ckpt"))["state_dict"] == {}
    assert load_shards(tmp_path / "b.ckpt", mesh=None)["state_dict"] == {}


def test_command_line_names_a_link_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        check_checkpoint(str(linked(tmp_path / "last.ckpt")))


# ----------------------------------------------------------------- what a checkpoint stands for


class Module(torch.nn.Module):
    """As much of a module as a checkpoint is compared with."""

    base_path, lora, average, replaced_components, _trainer = (
        "models/base",
        LoraSettings(rank=4, alpha=8),
        None,
        (),
        None,
    )
    weight_settings = MappingProxyType({"quantization": "none"})
    base_digests = MappingProxyType({"transformer": "aa", "vae": "bb"})

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        for name, value in changes.items():
            setattr(self, name, value)


class Other(Module):
    pass


NO_AVERAGE = SimpleNamespace(callbacks=[])
#: the module that saved, the module that loads, whether it trains, and words of the message (None: accepted)
IDENTITIES: dict[str, tuple[Module, Module, bool, str | None]] = {
    "the same": (Module(), Module(), True, None),
    "evaluated": (Module(), Module(), False, None),
    "other stage": (Other(), Module(), False, "is a checkpoint of Other, and this run trains Module"),
    "adapter forgotten": (Module(), Module(lora=None), False, "this run has no adapter"),
    "adapter added": (Module(lora=None), Module(), False, "--model.lora=null"),
    "other rank": (Module(lora=LoraSettings(rank=8, alpha=8)), Module(), False, "rank 8 and alpha 8"),
    "other alpha": (Module(lora=LoraSettings(rank=4, alpha=128)), Module(), False, "--model.lora.alpha=128"),
    "other dropout": (Module(lora=LoraSettings(rank=4, alpha=8, dropout=0.1)), Module(), True, None),
    "other quantization": (
        Module(weight_settings={"quantization": "nf4"}), Module(), False, "--model.quantization=nf4",
    ),
    "base replaced": (Module(base_digests={"transformer": "cc", "vae": "bb"}), Module(), False, "the transformer (aa)"),
    "other decoder": (Module(base_digests={"transformer": "aa", "vae": "cc"}), Module(), False, "in the vae (bb)"),
    "base without weights": (Module(), Module(base_digests={"vae": "bb"}), False, "no weights of the transformer"),
    "whole weights on another transformer": (
        Module(lora=None), Module(lora=None, base_digests={"transformer": "x", "vae": "bb"},
                                  replaced_components=("transformer",)), False, None,
    ),
    "whole weights resumed on another transformer": (
        Module(lora=None), Module(lora=None, base_digests={"transformer": "x", "vae": "bb"},
                                  replaced_components=("transformer",)), True, "base whose transformer is aa",
    ),
    "average dropped": (Module(average=object()), Module(_trainer=NO_AVERAGE), True, "would drop"),
    "average evaluated": (Module(average=object()), Module(_trainer=NO_AVERAGE), False, None),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_checkpoint_stands_for_what_was_trained(name: str) -> None:
    saved, loads, fits, words = IDENTITIES[name]
    checkpoint = {KEY: describe(saved)}
    if words is None:
        check_belongs(loads, checkpoint, "a.ckpt", fits=fits)
        return
    with pytest.raises(ValueError, match=r"a\.ckpt") as error:
        check_belongs(loads, checkpoint, "a.ckpt", fits=fits)
    assert words in str(error.value)


def test_checkpoint_of_a_stranger_says_nothing_of_its_base() -> None:
    with pytest.raises(ValueError, match=r"does not say which base.*export"):
        check_belongs(Module(), {"state_dict": {}}, "a.ckpt", fits=False)


@pytest.mark.parametrize(("state", "words"), [({}, "lacks 1 .*weight"), ({"weight": 0, "x": 0}, "has 1 .*such as x")])
def test_names_of_weights(state: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_names(Module(), state)


def test_average_is_found_where_it_was_saved() -> None:
    said = {KEY: {"averaged": True}}
    assert averaged_weights({KEY: {"averaged": False}}) is None
    assert averaged_weights(said | {"average": {"w": 1}}) == {"w": 1}
    assert averaged_weights(said | {"callbacks": {"WeightEMA": {"weights": {"w": 2}}}}) == {"w": 2}
    with pytest.raises(ValueError, match="has none"):
        averaged_weights(said)


# ----------------------------------------------------------------- adapters


def lora(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator) * scale


def adapter(prefix: str, down: str, up: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    a, b = lora()
    return {f"{prefix}.{down}": a, f"{prefix}.{up}": b} | more


PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
ALPHA = torch.tensor(8.0)
#: content, name of the file, settings beside it, and the scale: alpha / rank, with rank 2
READ: dict[str, tuple[dict, str, dict | None, float]] = {
    "diffusers": (adapter(f"transformer.{LAYER}", *PEFT), "pytorch_lora_weights.safetensors", None, 1),
    "transformer's own": (adapter(LAYER, *PEFT), "pytorch_lora_weights.safetensors", None, 1),
    "old diffusers": (
        adapter(f"transformer.{LAYER}", "lora.down.weight", "lora.up.weight"),
        "pytorch_lora_weights.safetensors", None, 1,
    ),
    "PEFT": (adapter(f"base_model.model.{LAYER}", *PEFT), "adapter_model.safetensors", {"lora_alpha": 8, "r": 2}, 4),
    "PEFT in memory": (
        adapter(f"base_model.model.{LAYER}", "lora_A.default.weight", "lora_B.default.weight"),
        "adapter_model.safetensors", {"lora_alpha": 8}, 4,
    ),
    "PEFT, scaled by the root": (
        adapter(f"base_model.model.{LAYER}", *PEFT), "adapter_model.safetensors",
        {"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5,
    ),
    "PEFT, alpha of a layer": (
        adapter(f"base_model.model.{LAYER}", *PEFT), "adapter_model.safetensors",
        {"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 1,
    ),
    "kohya": (
        adapter("lora_unet_blocks_0_to_q", *KOHYA) | {"lora_unet_blocks_0_to_q.alpha": ALPHA},
        "mine.safetensors", None, 4,
    ),
    "ComfyUI": (
        adapter(f"diffusion_model.{LAYER}", *PEFT) | {f"diffusion_model.{LAYER}.alpha": ALPHA},
        "mine.safetensors", None, 4,
    ),
    "ComfyUI without alpha": (adapter(f"diffusion_model.{LAYER}", *KOHYA), "mine.safetensors", None, 1),
    "names of both kinds": (
        adapter(LAYER, *PEFT) | adapter(f"transformer.{LAYER}", *PEFT), "mine.safetensors", None, 1,
    ),
}  # fmt: skip


def written(folder: Path, content: dict, name: str, settings: dict | None) -> Path:
    save_file({key: value.clone() for key, value in content.items()}, folder / name)
    if settings is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", READ)
def test_adapter_of_another_trainer_is_read(name: str, tmp_path: Path) -> None:
    """It adds `alpha / rank * B @ A` to the layer's weight."""
    content, file, settings, scale = READ[name]
    path = written(tmp_path, content, file, settings)
    factors = load_factors(path, read_layers(path, {LAYER}))
    assert factors.keys() == {f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"}
    down, up = lora()
    found = factors[f"{LAYER}.lora_B.weight"] @ factors[f"{LAYER}.lora_A.weight"]
    torch.testing.assert_close(found, scale * up @ down)


def only(**content: torch.Tensor) -> Callable[[Path], Path]:
    return lambda folder: written(folder, content, "pytorch_lora_weights.safetensors", None)


def more(key: str, shape: tuple[int, ...] = (5,)) -> Callable[[Path], Path]:
    return only(**adapter(f"transformer.{LAYER}", *PEFT), **{key: torch.ones(shape)})


def peft(settings: dict | None) -> Callable[[Path], Path]:
    return lambda p: written(p, adapter(f"base_model.model.{LAYER}", *PEFT), "adapter_model.safetensors", settings)


def renamed(name: str, content: bytes = b"x") -> Callable[[Path], Path]:
    return lambda folder: (raw(folder / name, content), folder)[1]


def two(folder: Path) -> Path:
    for name in ("a", "b"):
        written(folder, adapter(LAYER, *PEFT), f"{name}.safetensors", None)
    return folder


#: what is given, and words of the message
ADAPTERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda p: p / "none", "No adapter at"),
    "empty folder": (lambda p: p, "expected a directory with pytorch_lora_weights.safetensors"),
    "pickle of PEFT": (renamed("adapter_model.bin"), "could run its author's code"),
    "pickle of diffusers": (renamed("pytorch_lora_weights.pt"), "Save the adapter as safetensors"),
    "two files": (two, "several files of weights ('a.safetensors', 'b.safetensors')"),
    "empty file": (renamed("mine.safetensors", b""), "can't be read"),
    "half a file": (renamed("mine.safetensors", b"\x10" + bytes(7) + b"{"), "can't be read"),
    "no weights": (only(), "no factors at all"),
    "whole weights": (only(**{f"{LAYER}.weight": torch.ones(5, 6)}), "neither a factor"),
    "DoRA of kohya": (more(f"transformer.{LAYER}.dora_scale"), "is a DoRA"),
    "DoRA of PEFT": (more(f"transformer.{LAYER}.lora_magnitude_vector"), "is a DoRA"),
    "DoRA by its settings": (peft({"use_dora": True}), "is a DoRA by its settings"),
    "LoKr": (only(**{f"{LAYER}.lokr_w1": torch.ones(2, 2)}), "is a LoKr"),
    "LoHa": (only(**{f"{LAYER}.hada_w1_a": torch.ones(2, 2)}), "is a LoHa"),
    "difference": (only(**{f"diffusion_model.{LAYER}.diff": torch.ones(5, 6)}), "full difference of weights"),
    "text encoder": (more("text_encoder.layers.0.q.lora_A.weight", (2, 6)), "adapts a text encoder"),
    "text encoder of kohya": (more("lora_te1_layers_0_q.lora_down.weight", (2, 6)), "adapts a text encoder"),
    "biases": (more(f"transformer.{LAYER}.lora_B.bias"), "with biases"),
    "convolution": (more("transformer.conv.lora_A.weight", (2, 6, 1, 1)), "of convolutions"),
    "one factor": (only(**{f"{LAYER}.lora_A.weight": torch.ones(2, 6)}), "not the other"),
    "two ranks": (
        only(**{f"{LAYER}.lora_A.weight": torch.ones(2, 6), f"{LAYER}.lora_B.weight": torch.ones(5, 3)}),
        "ranks 2 and 3",
    ),
    "PEFT without settings": (peft(None), "adapter_config.json"),
    "alpha is no number": (
        only(**adapter(LAYER, *PEFT), **{f"{LAYER}.alpha": torch.tensor(float("nan"))}), "not finite",
    ),
    "another model's layer": (only(**adapter("single_blocks.3.linear1", *PEFT)), "adapts 'single_blocks.3.linear1'"),
    "kohya's name of another model": (only(**adapter("lora_unet_down_0_q", *KOHYA)), "adapts 'down_0_q'"),
    "another width": (
        only(**{f"{LAYER}.lora_A.weight": torch.ones(2, 9), f"{LAYER}.lora_B.weight": torch.ones(5, 2)}),
        "with 9 inputs",
    ),
    "another height": (
        only(**{f"{LAYER}.lora_A.weight": torch.ones(2, 6), f"{LAYER}.lora_B.weight": torch.ones(7, 2)}),
        "with 7 outputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    make, words = ADAPTERS[name]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "transformer").mkdir()
    save_file({f"{LAYER}.weight": torch.zeros(5, 6)}, tmp_path / "transformer" / "model.safetensors")
    with pytest.raises(ValueError, match="adapter") as error:
        check_adapter(make(tmp_path / "adapter"), tmp_path / "transformer")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
