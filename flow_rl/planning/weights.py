"""Components of a model on the meta device, from their configs: parameters, and what an optimizer keeps for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from flow_rl.models.adapters import add_lora
from flow_rl.models.loading import FAMILIES, check_model_path, config_directory, read_config
from flow_rl.planning.meter import metered

#: sizes of the parameters that an optimizer is tried on; 8-bit ones leave tensors under 4096 values alone
SMALL, LARGE = 4096 * 4, 4096 * 16


@dataclass(frozen=True, kw_only=True)
class Components:
    """A generator's parts on the meta device; the transformer has its adapters and knows what is trained.

    Attributes:
        transformer: the denoiser.
        text_encoder: a vision-language model.
        vae: the image decoder.
    """

    transformer: ModelMixin
    text_encoder: PreTrainedModel
    vae: ModelMixin


def build(path: str, lora: Any = None) -> Components:
    """Components of a model by its configs.

    Args:
        path: directory or hub id.
        lora: settings of the adapter to train; None trains all of the transformer.

    Raises:
        ValueError: a config that is missing.
    """
    family = FAMILIES[check_model_path(path)]
    with torch.device("meta"):
        transformer = _diffusers_part(path, "transformer")
        vae = _diffusers_part(path, "vae")
        text_encoder = build_vlm(str(config_directory(path) / "text_encoder"))
        if lora is not None:
            add_lora(transformer, **vars(lora), targets=family.lora_targets)
        else:
            transformer.requires_grad_(True)
    return Components(transformer=transformer, text_encoder=text_encoder, vae=vae)


def build_vlm(directory: str) -> PreTrainedModel:
    """A vision-language model on the meta device, from the config.json of a directory."""
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])._from_config(config)


def _diffusers_part(path: str, part: str) -> ModelMixin:
    config = read_config(path, part)
    return getattr(diffusers, config["_class_name"]).from_config(config)


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in all of them together."""
    return sum(parameter.numel() for parameter in parameters)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that want a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@dataclass(frozen=True, kw_only=True)
class OptimizerBytes:
    """Bytes of an optimizer's states: so many a value, and so many a tensor besides."""

    a_value: float
    a_tensor: float

    def total(self, parameters: Iterable[nn.Parameter]) -> int:
        """Bytes for these parameters."""
        return math.ceil(sum(p.numel() * self.a_value + self.a_tensor for p in parameters))


def optimizer_bytes(make: Any) -> OptimizerBytes:
    """What an optimizer keeps, seen by taking a step on two parameters.

    Args:
        make: makes the optimizer from a list of parameters.
    """
    sizes = []
    for size in (SMALL, LARGE):
        parameter = nn.Parameter(torch.zeros(size))
        optimizer = make([parameter])
        parameter.grad = torch.ones(size)
        optimizer.step()
        state = optimizer.state[parameter].values()
        sizes.append(sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor)))
    slope = (sizes[1] - sizes[0]) / (LARGE - SMALL)
    return OptimizerBytes(a_value=slope, a_tensor=sizes[0] - slope * SMALL)


def step_bytes(make: Any) -> float:
    """Bytes a value that a step makes for itself and drops again.

    torch's own optimizers run on lists of tensors on a GPU (`foreach`), which takes a copy of them all; others are
    taken to work in place.

    Args:
        make: makes the optimizer from a list of parameters.
    """
    parameter = nn.Parameter(torch.empty(LARGE, device="meta"))
    if not type(make([nn.Parameter(torch.zeros(1))])).__module__.startswith("torch.optim"):
        return 0.0
    optimizer = make([parameter])
    if any(group.get("fused") for group in optimizer.param_groups):
        return 0.0  # one kernel does it all, in place
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None:
            group["foreach"] = True
    with metered() as meter:
        parameter.grad = torch.empty(LARGE, device="meta")
        optimizer.step()  # makes the states
        return meter.read(optimizer.step)[1].peak / LARGE
