"""A pipeline's components as plain diffusers and transformers write them: no adapters, no shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from flow_rl.models.adapters import merged_copy
from flow_rl.models.whole import first_rank, is_sharded, whole_state

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel


@contextmanager
def whole_components(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Inside, transformer and text encoder know nothing of adapters or shards; every rank must enter.

    On other ranks than the first they stay as they are: those have nothing to write.
    """
    own = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
    try:
        pipeline.transformer = merged_copy(own["transformer"])
        pipeline.text_encoder = _whole_encoder(own["text_encoder"])
        yield
    finally:
        for name, component in own.items():
            setattr(pipeline, name, component)


def _whole_encoder(encoder: PreTrainedModel) -> PreTrainedModel:
    if not is_sharded(encoder):
        return encoder
    state = whole_state(encoder)
    if not first_rank():
        return encoder
    with torch.device("meta"):
        plain = type(encoder)(encoder.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    return plain
