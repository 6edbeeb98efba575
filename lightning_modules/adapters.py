"""Low-rank adapters on a generator's transformer, by peft through diffusers."""

from __future__ import annotations

import torch
from peft import LoraConfig

from lightning_modules.settings import LoraSettings
from models import ImageModel


def add_lora(model: ImageModel, settings: LoraSettings) -> None:
    """Freeze the transformer and give it a trainable adapter, kept in float32.

    In bfloat16 AdamW's small updates would be rounded away, so the adapter keeps fp32 masters.
    """
    model.transformer.requires_grad_(False)
    model.transformer.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(model.lora_targets),
        )
    )
    for parameter in model.transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
