"""Low-rank adapters on a transformer, by peft through diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.stored import standing_in
from models.whole import first_rank, is_sharded, whole_state

if TYPE_CHECKING:  # peft takes seconds to import, and most commands have no adapter
    from diffusers import ModelMixin
    from peft.tuners.tuners_utils import BaseTunerLayer

#: name that peft gives the adapter of `add_lora`
STUDENT_ADAPTER = "default"
#: name of diffusers for an adapter's weights
ADAPTER_FILE = "pytorch_lora_weights.safetensors"


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
    from peft import LoraConfig

    transformer.requires_grad_(False)
    with standing_in(transformer):
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
        )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Layers that have adapters, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def merged_copy(transformer: ModelMixin) -> ModelMixin:
    """The transformer with its adapters added into the weights, as a model that knows nothing of adapters or shards.

    Every rank must ask for a sharded one, and the first gets it.

    Returns:
        A new model, or the given one where it has neither adapter nor shards, or this rank isn't the first.
    """
    adapters = dict(adapted_layers(transformer))
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


def save_adapter(transformer: ModelMixin, path: str | Path, *, name: str = STUDENT_ADAPTER) -> None:
    """Write one adapter alone, in the layout that diffusers' `load_lora_adapter` reads.

    Every rank must ask for a sharded one, and the first writes it.
    """
    adapters = whole_state(transformer, part=".lora_")
    if not first_rank():
        return
    transformer.state_dict = lambda *_args, **_named: adapters  # diffusers asks the module, which may hold shards
    try:
        transformer.save_lora_adapter(str(path), adapter_name=name)
    finally:
        del transformer.state_dict


def load_frozen_adapter(transformer: ModelMixin, path: str | Path, name: str) -> None:
    """Give the transformer one more adapter, without gradient and not in use yet.

    Args:
        transformer: gets the adapter in place; the one in use and what is trainable stay as they are.
        path: directory that `save_adapter` or diffusers wrote; see `check_adapter`.
        name: to switch to it by.
    """
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    before = next((layer.active_adapters for _, layer in adapted_layers(transformer)), [])
    with standing_in(transformer):
        transformer.load_lora_adapter(
            str(path), prefix=None, adapter_name=name, weight_name=ADAPTER_FILE, use_safetensors=True
        )
    use_adapter(transformer, before[0] if before else None)
    for parameter in transformer.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


def use_adapter(transformer: nn.Module, name: str | None) -> None:
    """Compute with the adapter of that name, or with none; every other one is passed over.

    What is trainable stays as it is, which peft's own switch does not see to.
    """
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    for _, layer in adapted_layers(transformer):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)
    for parameter in transformer.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter's directory.

    Raises:
        ValueError: no such directory, or none in diffusers' layout.
    """
    file = Path(path) / ADAPTER_FILE
    if not file.is_file():
        raise ValueError(
            f"No adapter at '{path}': expected a directory with {ADAPTER_FILE}, as callbacks.ExportAdapter or "
            "diffusers' save_lora_adapter writes it."
        )
    return file


def check_adapter(path: str | Path, transformer: str | Path) -> None:
    """Refuse an adapter whose factors do not fit the saved transformer's layers. No weights are loaded.

    Args:
        path: the adapter's directory.
        transformer: directory with the transformer's safetensors.

    Raises:
        ValueError: naming the first layer that is missing or has another shape.
    """
    shapes = _shapes(Path(transformer).glob("*.safetensors"))
    factors = _shapes([adapter_file(path)])
    for key, shape in sorted(factors.items()):
        layer, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        own = shapes.get(f"{layer}.weight")
        if own is None:
            raise ValueError(f"The adapter '{path}' adapts '{layer}', which '{transformer}' does not have.")
        inside, side = (shape[1], own[1]) if factor == "A" else (shape[0], own[0])
        if inside != side:
            what = "inputs" if factor == "A" else "outputs"
            raise ValueError(
                f"The adapter '{path}' is made for a '{layer}' with {inside} {what}; '{transformer}' has {side} there."
            )


def _shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            found |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    return found
