"""Flow-matching pretraining, where it differs from what `tests/dist` runs."""

from __future__ import annotations

from functools import partial

import torch
from lightning import Trainer

from datamodules import CaptionedImageDataModule
from datamodules.captioned_images import CaptionedDataset, Example
from lightning_modules import FlowPretrain


class OnePicture(CaptionedDataset):
    """The same example again and again: what differs between batches is the noise alone."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Example:
        return torch.full((3, 32, 32), 0.5), "a red pot", None


def test_accumulated_batches_draw_noise_of_their_own(tiny_path) -> None:
    module = FlowPretrain(tiny_path, image_size=32, optimizer=partial(torch.optim.AdamW, lr=1e-3), caption_dropout=0.0)
    module.configure_model()
    seen, velocity = [], module.model.velocity
    module.model.velocity = lambda latents, sigma, conditioning: (
        seen.append((latents, sigma)) or velocity(latents, sigma, conditioning)
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, CaptionedImageDataModule(OnePicture(), OnePicture(), batch_size=2))
    assert len(seen) == 4
    levels = torch.cat([sigma for _, sigma in seen])
    assert len(levels.unique()) == len(levels) == 8
