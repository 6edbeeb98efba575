"""Low-rank adapters on a transformer, by peft through diffusers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from models.whole import is_sharded, whole_state


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
    """The transformer with its adapters added into the weights, as a model that knows nothing of adapters or shards.

    Every rank must ask for a sharded one, and the first gets it.

    Returns:
        A new model, or the given one where it has neither adapter nor shards, or this rank isn't the first.
    """
    adapters = {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}
    if not adapters and not is_sharded(transformer):
        return transformer
    full = whole_state(transformer)
    if not full:
        return transformer
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in full.items() if ".lora_" not in name}
    for name, module in adapters.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight.float() + adapter_delta(name, module, full)).to(weight.dtype)
    plain = type(transformer).from_config(transformer.config).to(transformer.dtype)
    plain.load_state_dict(state)
    return plain.eval()


def adapter_delta(name: str, module: BaseTunerLayer, state: Mapping[str, Tensor]) -> Tensor:
    """What the active adapters of a linear layer add to its weight, float32.

    Args:
        name: of the layer in its model.
        module: the layer.
        state: whole weights of the model.
    """
    return sum(
        module.scaling[adapter]
        * (state[f"{name}.lora_B.{adapter}.weight"].float() @ state[f"{name}.lora_A.{adapter}.weight"].float())
        for adapter in module.active_adapters
    )
