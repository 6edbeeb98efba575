"""What the families around a diffusers pipeline share: its modules, latent statistics, schedule, saving.

Shapes: N samples, S latent tokens, C latent channels, H height and W width in pixels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from flow_rl.flow.schedule import sigma_schedule
from flow_rl.models.diffusers_export import whole_components
from flow_rl.models.image_model import ImageModel
from flow_rl.models.memory import WeightDtypes
from flow_rl.models.prompt_tokens import DEFAULT_LIMIT, too_long
from flow_rl.models.shard_units import ShardUnit, text_encoder_units
from flow_rl.models.stored import StoredComponent, StoredParts, empty_component, local_directory
from flow_rl.models.whole import first_rank

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class PipelineModel(ImageModel):
    """A generator that computes with the components of diffusers' own pipeline.

    Args:
        pipeline: holds scheduler, VAE, text encoder and transformer.
        image_size: default height and width in pixels.
    """

    #: statistics by which latents are normalised
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, pipeline: DiffusionPipeline, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.vae = pipeline.vae
        self._pipeline = pipeline
        # A bundle of components that was not loaded from a model_index.json prescribes nothing.
        self._sample_sigmas = self.sample_sigmas(getattr(pipeline, "config", {}))
        self.image_size = image_size
        channels = (1, self.vae.config.z_dim, 1, 1, 1)
        for name in ("latents_mean", "latents_std"):
            values = torch.tensor(self.vae.config[name]).view(channels)
            self.register_buffer(name, values, persistent=False)
        self.max_prompt_tokens = self.prompt_limit(type(pipeline).__name__) or DEFAULT_LIMIT
        self.freeze_all_but_transformer()

    @property
    def pipeline(self) -> DiffusionPipeline:
        """Diffusers' own pipeline over the same modules, ready to call."""
        return self._pipeline

    def shard_units(self) -> tuple[ShardUnit, ...]:
        """See `ImageModel.shard_units`: transformer and text encoder."""
        return (*super().shard_units(), *text_encoder_units(self.text_encoder))

    @classmethod
    @abstractmethod
    def token_grid(cls, vae_config: Mapping[str, Any], size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in latent tokens of an image of `size` pixels, from the VAE's config alone.

        Raises:
            ValueError: a size that this family cannot make.
        """

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width in latent tokens of an image of `size` pixels; see `token_grid`."""
        return self.token_grid(self.vae.config, size or self.image_size)

    @classmethod
    def prompt_limit(cls, pipeline: str) -> int | None:
        """Most tokens that a prompt can have for a pipeline of that class, whatever is set; None where nothing is cut.

        Args:
            pipeline: name of the class, which `model_index.json` gives.
        """
        return None

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that are too long, rather than to read a part of them or to run out of memory.

        Raises:
            ValueError: naming the first one with its tokens.
        """
        for row, count in too_long(prompts, self.max_prompt_tokens, self._tokenizer).items():
            raise ValueError(
                f"The prompt '{prompts[row]:.60}...' has {count} tokens, and the generator reads at most "
                f"{self.max_prompt_tokens}. Shorten it, or raise model.max_prompt_tokens where the model allows it."
            )

    def _tokenizer(self) -> Any:
        pipeline = self._pipeline
        return getattr(pipeline, "tokenizer", None) or pipeline.processor.tokenizer

    @classmethod
    def sample_sigmas(cls, index: Mapping[str, Any]) -> list[float] | None:
        """Noise levels that the pipeline's config prescribes in place of equal steps; None where it prescribes none.

        Args:
            index: the pipeline's config, which is also the content of its `model_index.json`.
        """
        return None

    def sigmas(self, num_steps: int, *, size: tuple[int, int] | None = None) -> Tensor:
        """See `ImageModel.sigmas`."""
        return sigma_schedule(
            self._pipeline.scheduler,
            num_steps,
            image_tokens=math.prod(self.grid(size)),
            sample_sigmas=self._sample_sigmas,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        image_size: tuple[int, int],
        dtypes: WeightDtypes = WeightDtypes(),  # noqa: B008  (frozen)
        empty: bool = False,
    ) -> Self:
        """See `ImageModel.from_pretrained`."""
        if not empty:
            return cls(cls.load_pipeline(path, dtypes), image_size=image_size)
        directory = local_directory(path)
        parts = {
            name: empty_component(directory, name, getattr(dtypes, name)) for name in ("transformer", "text_encoder")
        }
        model = cls(cls.load_pipeline(directory, dtypes, **parts), image_size=image_size)
        model.stored = StoredParts({n: StoredComponent(directory / n, type(part)) for n, part in parts.items()})
        return model

    @classmethod
    @abstractmethod
    def load_pipeline(cls, path: str | Path, dtypes: WeightDtypes, **parts: nn.Module) -> DiffusionPipeline:
        """Diffusers' pipeline of this family from a directory or hub id; components that are given are not loaded."""

    def save_pretrained(self, path: str | Path) -> None:
        """See `ImageModel.save_pretrained`."""
        with whole_components(self._pipeline):
            if first_rank():
                self._pipeline.save_pretrained(str(path))


def check_multiple(size: tuple[int, int], multiple: int) -> None:
    """Refuse sides that are no multiple of so many pixels.

    Raises:
        ValueError: naming the multiple.
    """
    height, width = size
    if height % multiple or width % multiple or min(height, width) < multiple:
        raise ValueError(f"Image size {height} x {width} must be multiples of {multiple} pixels for this model.")
