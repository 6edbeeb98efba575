"""How much memory a generator's weights and activations take: the two switches that cost no accuracy of training."""

from __future__ import annotations

from typing import Literal

import torch

from models.image_model import ImageModel

FrozenDtype = Literal["float32", "bfloat16"]
FROZEN_DTYPES: dict[FrozenDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_memory(model: ImageModel, *, frozen_dtype: FrozenDtype, gradient_checkpointing: bool) -> None:
    """Hold what is not trained in fewer bits, and recompute activations in the backward pass.

    Call it once it is known which weights train, adapters added: those keep their float32. The VAE keeps it too: it is
    small, and rounding it would change every reward.

    Args:
        model: changed in place.
        frozen_dtype: of the text encoder and, where an adapter trains in its place, of the transformer.
        gradient_checkpointing: keep a block's input alone; a third more time for the update.
    """
    if frozen_dtype == "bfloat16":
        model.text_encoder.to(torch.bfloat16)
        trained = [p for p in model.transformer.parameters() if p.requires_grad]
        if len(trained) < len(list(model.transformer.parameters())):
            for parameter in model.transformer.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
    if gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
