"""Low-rank adapters on a transformer, by peft through diffusers.

An adapter that trains has float32 weights, the masters that the optimizer steps on, and computes in the dtype of the
layer that it adapts. Peft itself would compute in the dtype of the adapter's weights: on a bfloat16 base, every input
and output of an adapted layer would exist in float32 a second time, and the products would not use the tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from flow_rl.models.adapter_files import ADAPTER_FILE, load_factors, read_layers
from flow_rl.models.stored import standing_in
from flow_rl.models.whole import first_rank, is_sharded, whole_state

if TYPE_CHECKING:  # peft takes seconds to import, and most commands have no adapter
    from diffusers import ModelMixin
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

#: name that peft gives the adapter of `add_lora`
STUDENT_ADAPTER = "default"


class MasterLinear(nn.Linear):
    """One factor of an adapter: its weight rests in its own dtype and computes in that of the input.

    The gradient arrives through the cast, so it accumulates in the weight's dtype. Nothing is cast where the two dtypes
    are the same, as on a float32 base or where FSDP2 has cast the gathered weight already.
    """

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return functional.linear(inputs, self.weight.to(inputs.dtype), bias)


def add_lora(transformer: ModelMixin, *, rank: int, alpha: int, dropout: float, targets: tuple[str, ...]) -> None:
    """Freeze the transformer and give it a trainable adapter; see `add_trainable`.

    Args:
        transformer: gets the adapter in place.
        rank: of the two factors.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: on the adapter's input.
        targets: names of the linear layers to adapt.
    """
    from peft import LoraConfig

    add_trainable(transformer, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)))


def add_trainable(model: ModelMixin | PreTrainedModel, config: LoraConfig) -> None:
    """Freeze a model of diffusers or transformers and give it a trainable adapter.

    The adapter's weights are float32 whatever the model's are: in bfloat16 AdamW's small updates would be rounded away.
    They are drawn from the CPU's generator wherever the model lives, so one seed gives one adapter.

    Args:
        model: gets the adapter in place.
        config: of peft.
    """
    model.requires_grad_(False)
    with standing_in(model):
        model.add_adapter(config)
    settle_adapter(model, STUDENT_ADAPTER, dtype=torch.float32)


def settle_adapter(model: nn.Module, name: str, *, dtype: torch.dtype | None) -> None:
    """Put a new adapter beside the weights of its layers, and have it compute in their dtype.

    Args:
        model: has the adapter.
        name: of the adapter.
        dtype: of the adapter's weights; None takes that of each layer's own.
    """
    for _, layer in adapted_layers(model):
        base = layer.get_base_layer().weight
        place: dict[str, Any] = {} if base.is_meta else {"device": base.device}  # shards get their device later
        if dtype is not None or base.is_floating_point():  # quantised weights have no dtype to take
            place["dtype"] = dtype or base.dtype
        factors = [group[name] for group in (layer.lora_A, layer.lora_B) if name in group]
        for factor in factors:
            factor.to(**place)
            if type(factor) is nn.Linear:
                factor.__class__ = MasterLinear  # the same module to whoever holds it, hooks and names and all
        if all(isinstance(f, MasterLinear) for group in (layer.lora_A, layer.lora_B) for f in group.values()):
            layer.cast_input_dtype_enabled = False


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
    delta: Tensor = sum(
        module.scaling[adapter]
        * (state[f"{name}.lora_B.{adapter}.weight"].float() @ state[f"{name}.lora_A.{adapter}.weight"].float())
        for adapter in module.active_adapters
    )
    return delta


def save_adapter(transformer: ModelMixin, path: str | Path, *, name: str = STUDENT_ADAPTER) -> None:
    """Write one adapter alone, so that diffusers reads it with `pipe.load_lora_weights` and with `load_lora_adapter`.

    Each factor is there twice: as a pipeline calls it (`transformer.<layer>.lora_A.weight`), and as a transformer does,
    without the prefix. The scale is in B, since such a file can't hold an alpha that all of its readers find.

    Every rank must ask for a sharded one, and the first writes it.
    """
    adapters = whole_state(transformer, part=".lora_")
    if not first_rank():
        return
    layers = {layer: module for layer, module in adapted_layers(transformer) if name in module.lora_A}
    factors: dict[str, Tensor] = {}
    for layer, module in layers.items():
        down, up = (adapters[f"{layer}.lora_{side}.{name}.weight"] for side in "AB")
        factors[f"{layer}.lora_A.weight"] = down.cpu().contiguous()
        factors[f"{layer}.lora_B.weight"] = (up.float() * module.scaling[name]).to(up.dtype).cpu().contiguous()
    Path(path).mkdir(parents=True, exist_ok=True)
    both = factors | {f"transformer.{key}": tensor.clone() for key, tensor in factors.items()}
    save_file(both, Path(path) / ADAPTER_FILE, metadata={"format": "pt"})


def load_frozen_adapter(transformer: ModelMixin, path: str | Path, name: str) -> None:
    """Give the transformer one more adapter, without gradient and not in use yet.

    Its weights are rounded to the dtype of the layers' own once, as nothing will step on them.

    Args:
        transformer: gets the adapter in place; the one in use and what is trainable stay as they are.
        path: of an adapter, in any layout of `adapter_files`; see `check_adapter`.
        name: to switch to it by.
    """
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    before: list[str] = next((layer.active_adapters for _, layer in adapted_layers(transformer)), [])
    linear = {n.replace(".base_layer", "") for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    layers = read_layers(path, linear)
    if unknown := sorted(layers.keys() - linear):
        raise ValueError(f"The adapter '{path}' adapts '{unknown[0]}', which is no linear layer of the transformer.")
    with standing_in(transformer):
        transformer.load_lora_adapter(load_factors(path, layers), prefix=None, adapter_name=name)
    settle_adapter(transformer, name, dtype=None)
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


def check_adapter(path: str | Path, transformer: str | Path) -> None:
    """Refuse an adapter whose factors do not fit the saved transformer's layers. No weights are loaded.

    Args:
        path: of the adapter, in any layout of `adapter_files`.
        transformer: directory with the transformer's safetensors.

    Raises:
        ValueError: naming the first layer that is missing or has another shape, or what the file is.
    """
    shapes = _shapes(Path(transformer).glob("*.safetensors"))
    layers = read_layers(path, {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")})
    for layer, factors in layers.items():
        own = shapes.get(f"{layer}.weight")
        if own is None:
            raise ValueError(f"The adapter '{path}' adapts '{layer}', which '{transformer}' does not have.")
        outputs, inputs = own[0], own[-1]
        for what, inside, side in (("inputs", factors.inputs, inputs), ("outputs", factors.outputs, outputs)):
            if inside != side:
                raise ValueError(
                    f"The adapter '{path}' is made for a '{layer}' with {inside} {what}; '{transformer}' has {side} "
                    "there."
                )


def _shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            found |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    return found


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Train a low-rank adapter (peft) in place of the full weights."""

    rank: int = 32
    """Rank of the update of each layer."""
    alpha: int = 64
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"model.lora.rank is {self.rank}; it must be at least 1, or set model.lora to null.")
        if self.alpha < 1:
            raise ValueError(f"model.lora.alpha is {self.alpha}; it must be at least 1 (0 would learn nothing).")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout is {self.dropout}; it must lie in [0, 1).")
