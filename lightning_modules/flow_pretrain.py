"""Flow matching on captioned images and edit pairs: makes the demo's base, and plain fine-tuning of any base.

Shapes: N samples, S latent tokens, C latent channels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from flow_rl.batches import Captioned
from flow_rl.distributed.gradients import world_size
from flow_rl.distributed.sharding import gather, release
from flow_rl.errors import check_above_zero
from flow_rl.flow.noise import Stream, batch_noise, keyed_generator
from flow_rl.flow.objectives import velocity_matching_loss
from flow_rl.flow.schedule import noise_latents
from flow_rl.models import ImageModel, load_image_model
from flow_rl.models.loading import peek_grid
from flow_rl.models.workload import Generator
from flow_rl.planning.stage import Profile
from lightning_modules.base import TrainedModule, check_optimizer
from strategies import distribute, is_sharded_run


class FlowPretrain(TrainedModule):
    """Regresses the velocity v = eps - x_0 at a random noise level; captions are dropped at random for guidance.

    Args:
        model_path: where to start, a directory in the diffusers layout.
        image_size: height and width in pixels.
        optimizer: of the trainable weights.
        lr_scheduler: stepped after every batch; None keeps the rate.
        train_text_encoder: train the text encoder along with the transformer (a tiny one starts from nothing).
        caption_dropout: share of captions replaced by the blank prompt, in [0, 1).
        timestep_shift: noise levels are s u / (1 + (s - 1) u) with u uniform: above 1, more time at high noise.
        gradient_clip: largest gradient norm.
        max_prompt_tokens: refuse longer captions as they are encoded; None takes the family's limit.
        seed: of noise, noise levels and dropped captions.
    """

    def __init__(
        self,
        model_path: str,
        image_size: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        train_text_encoder: bool = False,
        caption_dropout: float = 0.1,
        timestep_shift: float = 3.0,
        gradient_clip: float = 1.0,
        max_prompt_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        peek_grid(model_path, (image_size, image_size))
        check_optimizer(optimizer, lr_scheduler)
        check_above_zero("model", gradient_clip=gradient_clip)
        if max_prompt_tokens is not None:
            check_above_zero("model", max_prompt_tokens=max_prompt_tokens)
        if not 0 <= caption_dropout < 1:
            raise ValueError(
                f"model.caption_dropout is {caption_dropout}; it is a share in [0, 1). At 1 no caption is ever read."
            )
        if timestep_shift <= 0:
            raise ValueError(f"model.timestep_shift is {timestep_shift}; it must be positive (1 is uniform).")
        self.model_path = model_path
        self.image_size = image_size
        self.make_optimizer = optimizer
        self.make_scheduler = lr_scheduler
        self.train_text_encoder = train_text_encoder
        self.caption_dropout = caption_dropout
        self.timestep_shift = timestep_shift
        self.gradient_clip = gradient_clip
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.model: ImageModel | None = None
        self.validation_loss = MeanMetric()

    @property
    @override
    def replaced_components(self) -> tuple[str, ...]:
        return ("transformer", "text_encoder") if self.train_text_encoder else ("transformer",)

    @override
    def profile(self) -> Profile:
        return replace(super().profile(), generator=Generator(model_path=self.model_path, image_size=self.image_size))

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        size = (self.image_size, self.image_size)
        self.model = load_image_model(self.model_path, image_size=size, empty=is_sharded_run(self))
        if self.max_prompt_tokens is not None:
            self.model.max_prompt_tokens = self.max_prompt_tokens
        self.model.transformer.requires_grad_(True)
        if self.train_text_encoder:
            self.model.text_encoder.requires_grad_(True)
        self.model.uniform_forwards = distribute(self, self.model, self.model.shard_units(), self.model.stored)

    @override
    def transfer_batch_to_device(self, batch: Captioned, device: torch.device, dataloader_idx: int) -> Captioned:
        return batch.to(device)

    @override
    def training_step(self, batch: Captioned, batch_idx: int) -> Tensor:
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx  # not of updates, which may add several batches up
        dropped = self._uniform(batch, step, Stream.DROPOUT) < self.caption_dropout
        captions = [("" if drop else text) for text, drop in zip(batch.captions, dropped.tolist(), strict=True)]
        # Prefix and target use the blocks twice in one backward: they stay whole until it is done.
        gather(self.model)
        # Ranks may hold different numbers of samples: the mean over the ranks is that over all samples.
        loss = self._loss(batch, captions, step) * (len(batch) * world_size() / batch.total)
        self.note_loss(loss)
        self.log_means({"loss": loss.detach()}, batch_size=batch.total)
        return loss

    @override
    def on_after_backward(self) -> None:
        release(self.model)

    @override
    def validation_step(self, batch: Captioned, batch_idx: int) -> None:
        # The same noise every time, so the curve shows the weights and nothing else.
        self.validation_loss.update(self._loss(batch, list(batch.captions), -1 - batch_idx), weight=len(batch))

    @override
    def on_validation_epoch_start(self) -> None:
        gather(self.model)

    @override
    def on_validation_epoch_end(self) -> None:
        release(self.model)
        self.log("val/loss", self.validation_loss.compute(), prog_bar=True)
        self.validation_loss.reset()

    def _loss(self, batch: Captioned, captions: list[str], step: int) -> Tensor:
        x_0 = self.model.encode_images(batch.images)
        uniform = self._uniform(batch, step, Stream.TIMESTEP).to(x_0.device)
        sigma = self.timestep_shift * uniform / (1 + (self.timestep_shift - 1) * uniform)
        noise = batch_noise(
            tuple(x_0.shape[1:]),
            seed=self.seed,
            step=step,
            ids=batch.positions,
            members=[0] * len(batch),
            stream=Stream.FORWARD,
        ).to(x_0.device)
        with torch.set_grad_enabled(self.train_text_encoder and torch.is_grad_enabled()):
            conditioning = self.model.encode(captions, batch.sources)
        velocity = self.model.velocity(noise_latents(x_0, noise, sigma), sigma, conditioning)
        loss, _ = velocity_matching_loss(velocity, noise - x_0)
        return loss

    def _uniform(self, batch: Captioned, step: int, stream: Stream) -> Tensor:
        """Numbers in [0, 1) for the samples, drawn for the batch of all ranks."""
        generator = keyed_generator(seed=self.seed, step=step, sample_id=0, member=0, stream=stream)
        return torch.rand(batch.total, generator=generator)[list(batch.positions)]

    def export(self, path: str | Path) -> None:
        """Write the generator in the diffusers layout."""
        self.model.save_pretrained(path)
