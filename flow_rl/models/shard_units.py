"""What a model says about being sharded: which parts are cut up, and into which pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ShardUnit:
    """A module whose weights are spread over the ranks; whatever is in no unit is whole on each of them.

    Attributes:
        root: called as a whole, never by its parts alone.
        blocks: modules inside the root whose weights are gathered one after the other.
    """

    root: nn.Module
    blocks: tuple[nn.Module, ...] = ()


def vlm_unit(model: PreTrainedModel) -> ShardUnit:
    """A vision-language model that is called as a whole: language layers and vision blocks one by one."""
    return ShardUnit(model, _blocks(model))


def text_encoder_units(model: PreTrainedModel) -> tuple[ShardUnit, ...]:
    """A vision-language model of which only the hidden states are used: its head is never called."""
    units = (ShardUnit(model.model, _blocks(model)),)
    if model.lm_head.weight is model.get_input_embeddings().weight:
        return units  # the head is the embedding, which is sharded with the rest
    return (*units, ShardUnit(model.lm_head))


def _blocks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    return (*model.model.visual.blocks, *model.model.language_model.layers)
