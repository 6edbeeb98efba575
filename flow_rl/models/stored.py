"""Models whose weights are still on disk: built without memory for them, and read a tensor at a time.

A sharded run builds its model this way, shards it, and lets the first rank send out what it reads: no rank ever holds
a whole copy. Parameters are on the meta device until then. Buffers are made for real: rotary tables and the like are in
no file, and what a constructor computes is what they have to be.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import override

if TYPE_CHECKING:  # both take seconds to import
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    ModelClass: TypeAlias = type[ModelMixin] | type[PreTrainedModel]

#: what diffusers and transformers call the file of a component, or the index of several
STEMS = ("diffusion_pytorch_model", "model")


class WeightReader(ABC):
    """Gives a model's tensors by their names in the model; the first rank alone is asked."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, as stored, on the CPU."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""

    @abstractmethod
    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that could not be read."""

    @abstractmethod
    def close(self) -> None:
        """Give up what was kept in memory for reading."""


class StoredComponent(WeightReader):
    """A component's safetensors, in one file or several.

    Where a file has other names than the model (older checkpoints of text encoders, which transformers renames as it
    loads them), the component is loaded by its own class, on the rank that reads, in the dtype it is stored in.

    Args:
        directory: of the component.
        kind: class of the component.

    Raises:
        ValueError: no safetensors in the directory.
    """

    def __init__(self, directory: Path, kind: ModelClass) -> None:
        self._directory, self._kind = directory, kind
        self._files = _file_by_name(directory)
        self._loaded: dict[str, Tensor] | None = None

    @override
    def read(self, name: str) -> Tensor:
        if self._loaded is not None:
            return self._loaded[name]
        with safe_open(self._files[name], framework="pt") as weights:
            tensor: Tensor = weights.get_tensor(name)
            return tensor

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        if self._loaded is not None:
            return tuple(self._loaded[name].shape)
        with safe_open(self._files[name], framework="pt") as weights:
            return tuple(weights.get_slice(name).get_shape())

    @override
    def missing(self, names: Iterable[str]) -> list[str]:
        wanted = list(names)
        if self._loaded is None and _is_of_transformers(self._kind) and not self._files.keys() >= set(wanted):
            self._loaded = self._kind.from_pretrained(str(self._directory), dtype="auto").state_dict()
        return [name for name in wanted if name not in (self._files if self._loaded is None else self._loaded)]

    @override
    def close(self) -> None:
        self._loaded = None


class StoredParts(WeightReader):
    """Several components, as the children of one model; an adapter's wrapping of a layer does not change its name.

    Args:
        parts: readers by the name of the child; the empty name is the model itself.
    """

    def __init__(self, parts: Mapping[str, WeightReader]) -> None:
        self._parts = dict(parts)

    def _place(self, name: str) -> tuple[str, str]:
        plain = name.replace(".base_layer.", ".")
        part, _, rest = ("", "", plain) if "" in self._parts else plain.partition(".")
        return part, rest

    @override
    def read(self, name: str) -> Tensor:
        part, rest = self._place(name)
        return self._parts[part].read(rest)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        part, rest = self._place(name)
        return self._parts[part].shape(rest)

    @override
    def missing(self, names: Iterable[str]) -> list[str]:
        by_part: dict[str, dict[str, str]] = {}
        for name in names:
            part, rest = self._place(name)
            by_part.setdefault(part, {})[rest] = name
        absent = []
        for part, own in by_part.items():
            lacking = self._parts[part].missing(own) if part in self._parts else list(own)
            absent += [own[name] for name in lacking]
        return absent

    @override
    def close(self) -> None:
        for part in self._parts.values():
            part.close()


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Inside, weights pass for float32 zeros on the CPU that take no memory, and new tensors are made on the CPU.

    Peft makes a new adapter by the default device's random numbers, and moves it to the device and the dtype of its
    layer's weights. Here they are always the CPU's, in float32: one seed gives one adapter, whether the model is on a
    GPU, in bfloat16, or has no memory yet. Quantised weights are left alone: they tell peft what kind of layer theirs
    is. In a block whose default device is meta, everything stays there, so that plans cost nothing.
    """
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if type(parameter) is nn.Parameter and parameter.is_floating_point()
    ]
    device = torch.device("meta" if torch.get_default_device().type == "meta" else "cpu")
    for module, name, parameter in held:
        zeros = torch.zeros((), dtype=torch.float32, device=device).expand(parameter.shape)
        module._parameters[name] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
    try:
        with device:
            yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


def local_directory(path: str | Path) -> Path:
    """The directory of a model in the diffusers layout; a hub id is downloaded unless it was."""
    if Path(path).is_dir():
        return Path(path)
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(str(path)))


def component_class(directory: Path, component: str) -> ModelClass:
    """The class that model_index.json names for a component."""
    library, name = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))[component]
    kind: ModelClass = getattr(importlib.import_module(library), name)
    return kind


def empty_component(directory: Path, component: str, dtype: torch.dtype) -> nn.Module:
    """A component of a pipeline without memory for its parameters, in evaluation mode.

    Buffers are real, and those of `from_pretrained`: the dtype is of the parameters alone.
    """
    return empty_model(component_class(directory, component), directory / component, dtype)


def empty_model(kind: ModelClass, directory: str | Path, dtype: torch.dtype) -> nn.Module:
    """A model of diffusers or transformers by the config in its directory; see `empty_component`."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if _is_of_transformers(kind):
            model = kind._from_config(kind.config_class.from_pretrained(str(directory)), dtype=dtype)
        else:
            model = kind.from_config(kind.load_config(str(directory)))
            for parameter in model.parameters():  # `model.to` would round the buffers as well
                parameter.data = parameter.data.to(dtype)
    if _is_of_transformers(kind):
        model.tie_weights()  # each parameter became another object as it was emptied
    emptied: nn.Module = model.eval()
    return emptied


def _is_of_transformers(kind: ModelClass) -> bool:
    from transformers import PreTrainedModel

    return issubclass(kind, PreTrainedModel)


def _file_by_name(directory: Path) -> dict[str, Path]:
    for stem in STEMS:
        index, single = directory / f"{stem}.safetensors.index.json", directory / f"{stem}.safetensors"
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: directory / file for name, file in names.items()}
        if single.is_file():
            with safe_open(single, framework="pt") as weights:
                return dict.fromkeys(weights.keys(), single)
    raise ValueError(
        f"'{directory}' has no {' or '.join(f'{stem}.safetensors' for stem in STEMS)}: its weights are missing, or not "
        "in the safetensors format. Save the model again with `save_pretrained`."
    )
