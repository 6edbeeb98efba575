"""Vision-language models through plain transformers: find, load, adapt, and write them without adapters.

Supported are Qwen3-VL and Qwen2.5-VL; everything else in the project sees them through this file.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from flow_rl.models.adapters import adapter_delta, add_trainable
from flow_rl.models.stored import StoredComponent, StoredParts, WeightReader, empty_model
from flow_rl.models.whole import first_rank, whole_state
from flow_rl.suggestions import nearest_path

#: `model_type` in config.json -> what people call it
FAMILIES = {"qwen3_vl": "Qwen3-VL", "qwen2_5_vl": "Qwen2.5-VL"}
_LANGUAGE_LAYERS = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_QUANTISATION_STATE = re.compile(r"\.weight\.(absmax|quant_map|nested_|quant_state|bitsandbytes)")
_VISION_LAYERS = r".*visual\.blocks\..*\.(qkv|proj|linear_fc1|linear_fc2|gate_proj|up_proj|down_proj)"


def check_vlm_path(path: str | Path) -> str:
    """The family of a local directory, from its config alone.

    Raises:
        ValueError: no such directory, no config.json, or a family that is not supported.
    """
    directory = Path(path)
    if not directory.is_dir():
        hint = nearest_path(directory)
        raise ValueError(f"No model directory at '{directory}'.{hint} Expected what `save_pretrained` wrote.")
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(f"'{directory}' has no config.json, so it is no model that transformers wrote.")
    try:
        family = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"'{config}', line {error.lineno}: not JSON ({error.msg}).") from None
    if family not in FAMILIES:
        raise ValueError(
            f"'{directory}' holds a model of type '{family}'; supported are {', '.join(FAMILIES.values())}."
        )
    return str(family)


def load_empty_vlm(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, ProcessorMixin, WeightReader]:
    """As `load_vlm`, with the weights still on disk: a sharded run reads them from there.

    Raises:
        ValueError: see `check_vlm_path`.
    """
    check_vlm_path(path)
    kind = getattr(transformers, AutoConfig.from_pretrained(str(path), local_files_only=True).architectures[0])
    model = empty_model(kind, path, dtype)
    processor = AutoProcessor.from_pretrained(str(path), local_files_only=True)
    return model, processor, StoredParts({"": StoredComponent(Path(path), kind)})


def load_vlm(
    path: str | Path, *, dtype: torch.dtype = torch.float32, nf4: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor of a local directory, in evaluation mode.

    Args:
        path: what `save_pretrained` wrote.
        dtype: of the weights; with nf4, of everything that is not quantised and of the computation.
        nf4: hold the linear layers in 4 bits (bitsandbytes' NormalFloat, arXiv 2305.14314).

    Raises:
        ValueError: see `check_vlm_path`.
    """
    check_vlm_path(path)
    quantization = None
    if nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForImageTextToText.from_pretrained(
        str(path), dtype=dtype, quantization_config=quantization, local_files_only=True
    )
    for module in model.modules() if nf4 else ():
        # On CPUs with bfloat16 instructions bitsandbytes would reorder the weights in the first evaluation without
        # gradient and compute in bfloat16 from then on: not what was asked for, and another model on another CPU.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    processor = AutoProcessor.from_pretrained(str(path), local_files_only=True)
    return model.eval(), processor


def freeze_vision(model: PreTrainedModel) -> None:
    """Take the vision tower out of training."""
    for name, parameter in model.named_parameters():
        if ".visual." in f".{name}":
            parameter.requires_grad_(False)


def add_vlm_lora(model: PreTrainedModel, *, rank: int, alpha: int, dropout: float, vision: bool) -> None:
    """Freeze the model and give it a trainable adapter; see `flow_rl.models.adapters.add_trainable`.

    Args:
        model: gets the adapter in place.
        rank: of the two factors.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: on the adapter's input.
        vision: adapt the vision tower's blocks as well as the language model's.
    """
    targets = f"{_LANGUAGE_LAYERS}|{_VISION_LAYERS}" if vision else _LANGUAGE_LAYERS
    add_trainable(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets))


def save_plain(model: PreTrainedModel, processor: ProcessorMixin, path: str | Path) -> None:
    """Write a directory that plain transformers loads: adapters added into the weights, nothing quantised.

    4-bit weights are written as what they stand for, so the exported model is the one that was trained. Every rank
    calls it, and the first writes.

    Args:
        model: as trained; it is left as it is.
        processor: written beside it.
        path: the directory.
    """
    state = plain_state_dict(model)
    if not first_rank():
        return
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    plain.save_pretrained(str(path))
    processor.save_pretrained(str(path))


def plain_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights by the names that the model has without adapters and without quantisation; none but on rank 0."""
    full = whole_state(model)
    if not full:
        return {}
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in full.items()
        if ".lora_" not in name and not _QUANTISATION_STATE.search(name)
    }
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is not None:
            state[f"{name.removesuffix('.base_layer')}.weight"] = _dequantised(module, dtype)
    for name, module in adapters.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight.float() + adapter_delta(name, module, full)).to(weight.dtype)
    return {name: tensor.cpu() for name, tensor in state.items()}


def _dequantised(module: nn.Module, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit  # only a quantised model needs it, and its import is slow

    weight: Any = module.weight
    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
