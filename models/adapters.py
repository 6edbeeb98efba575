"""Low-rank adapters on a transformer, by peft through diffusers."""

from __future__ import annotations

import copy

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def add_lora(transformer: ModelMixin, *, rank: int, alpha: int, dropout: float, targets: tuple[str, ...]) -> None:
    """Freeze the transformer and give it a trainable adapter, kept in float32.

    In bfloat16 AdamW's small updates would be rounded away, so the adapter keeps fp32 masters.

    Args:
        transformer: gets the adapter in place.
        rank: of the two factors.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: on the adapter's input.
        targets: names of the linear layers to adapt.
    """
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def merged_copy(transformer: ModelMixin) -> ModelMixin:
    """The transformer with its adapters added into the weights, as a model that knows nothing of adapters.

    Returns:
        A new model, or the given one where it has no adapter.
    """
    if not any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
        return transformer
    merged: nn.Module = copy.deepcopy(transformer)
    for module in merged.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in merged.state_dict().items()
        if ".lora_" not in name
    }
    plain = type(transformer).from_config(transformer.config).to(transformer.dtype)
    plain.load_state_dict(state)
    return plain.eval()
