"""The one interface of image generators: encode, velocity, decode.

Shapes: N samples, P distinct prompts, L text tokens of one prompt, D text channels, S latent tokens of one
image, C latent channels, H height and W width in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flow_rl.models.flops import Flops
from flow_rl.models.memory import WeightDtypes
from flow_rl.models.prompt_tokens import DEFAULT_LIMIT
from flow_rl.models.shard_units import ShardUnit
from flow_rl.models.stored import WeightReader

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import ModelMixin

BlockForward = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a velocity depends on besides the latents and sigma: N samples drawn from P distinct prompts.

    Prompts are kept unpadded, so that what a sample gets never depends on the other prompts of its batch.

    Attributes:
        embeds: P text embeddings, each (L, D).
        image_slots: P masks, each (L,), True where a token stands for a patch of a source image. On the CPU: they
            decide shapes, which the host must know.
        target_grid: height and width of the target in latent tokens.
        source_grid: the same of the source image; None for text-to-image.
        source_latents: packed source images (P, S, C); None for text-to-image.
        rows: int64 (N,) on the CPU: which of the P prompts each sample belongs to.
        prefix: what the model computed once for all denoising steps (see `ImageModel.cache_prefix`), or None.
    """

    embeds: tuple[Tensor, ...]
    image_slots: tuple[Tensor, ...]
    target_grid: tuple[int, int]
    source_grid: tuple[int, int] | None
    source_latents: Tensor | None
    rows: Tensor
    prefix: Any = None

    def __len__(self) -> int:
        return self.rows.shape[0]

    def select(self, index: Tensor | Sequence[int] | slice) -> Conditioning:
        """The samples at `index` (anything that indexes a 1-D tensor), in that order."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=torch.long)
        return replace(self, rows=self.rows[index])

    def repeat_interleave(self, times: int) -> Conditioning:
        """Every sample `times` times, copies side by side: one prompt becomes a group."""
        return replace(self, rows=self.rows.repeat_interleave(times))

    def detach(self) -> Conditioning:
        """The same values cut off from the autograd graph."""
        source = None if self.source_latents is None else self.source_latents.detach()
        return replace(self, embeds=tuple(e.detach() for e in self.embeds), source_latents=source)


class ImageModel(nn.Module, ABC):
    """One image generator: text encoder, denoiser (`transformer`), image decoder and sigma schedule.

    Attributes:
        transformer: the denoiser, the only part that post-training changes.
        image_size: height and width in pixels used where a caller names none.
        on_flops: called with the floating-point operations of each of the transformer's forwards, and of each backward
            as it happens; None counts nothing. A family that does not count never calls it.
        uniform_forwards: make the same number of transformer forwards whatever is in a batch. Ranks that hold shards
            of one transformer set it: the forwards of one wait for those of the others.
        compiled: whether the transformer's blocks are compiled; see `compilation.compile_blocks`, which sets it.
        stored: reads the weights of a model that was loaded without them; None for the others.
        max_prompt_tokens: `encode` refuses longer prompts, as `flow_rl.models.prompt_tokens` counts them.
    """

    transformer: ModelMixin
    image_size: tuple[int, int]
    on_flops: Callable[[float], None] | None = None
    uniform_forwards: bool = False
    compiled: bool = False
    stored: WeightReader | None = None
    max_prompt_tokens: int = DEFAULT_LIMIT
    #: names of the transformer's linear layers that a LoRA adapts
    lora_targets: ClassVar[tuple[str, ...]]

    @abstractmethod
    def encode(
        self, prompts: Sequence[str], images: Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> Conditioning:
        """Encode one prompt a sample.

        Args:
            prompts: N texts; for edits, instructions. An empty text is the unconditional branch.
            images: source images in [0, 1], shape (N, 3, H, W); None for text-to-image.
            size: height and width of the images to make, in pixels.

        Returns:
            Conditioning of N samples.

        Raises:
            ValueError: a prompt of more than `max_prompt_tokens` tokens.
        """

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: float | Tensor, conditioning: Conditioning) -> Tensor:
        """The one denoising evaluation: v(x_t, t, c), shared by rollout, replay, distillation and evaluation.

        Args:
            latents: x_t, shape (N, S, C).
            sigma: t in [0, 1], one for all or one a sample (N,).
            conditioning: of N samples.

        Returns:
            float32 velocity, shape (N, S, C). Carries gradients to the transformer's weights if grad is enabled.
        """

    @abstractmethod
    def cache_prefix(self, conditioning: Conditioning) -> Conditioning:
        """Compute, without gradient, what no denoising step changes. Stale once weights change."""

    @abstractmethod
    def decode(self, latents: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Images in [0, 1], float32 (N, 3, H, W), from latents (N, S, C). No gradient."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised latents (N, S, C) of images in [0, 1], shape (N, 3, H, W). No gradient."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        """(S, C) of an image of that many pixels."""

    @abstractmethod
    def sigmas(self, num_steps: int, *, size: tuple[int, int] | None = None) -> Tensor:
        """The shifted schedule, float32 (num_steps + 1,), descending to 0, from the model's own scheduler.

        Raises:
            ValueError: another number of steps than a few-step variant prescribes.
        """

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        image_size: tuple[int, int],
        dtypes: WeightDtypes = WeightDtypes(),  # noqa: B008  (frozen)
        empty: bool = False,
    ) -> ImageModel:
        """Load a model.

        Args:
            path: directory (or hub id) in the diffusers layout.
            image_size: default height and width in pixels.
            dtypes: of the weights; buffers are float32.
            empty: leave the weights of what `shard_units` names on disk, for `stored` to read them later.
        """

    @abstractmethod
    def save_pretrained(self, path: str | Path) -> None:
        """Write a directory in the diffusers layout, adapters merged: plain diffusers loads it.

        Every rank calls it, and the first writes.
        """

    @property
    def device(self) -> torch.device:
        """The device that it computes on, which latents and source images must be on.

        Shards of weights do not say: under `cpu_offload` they rest in CPU memory and compute on a GPU. Whole tensors,
        such as the VAE's, are on the device itself.
        """
        return next(t.device for t in chain(self.buffers(), self.parameters()) if not isinstance(t, DTensor))

    def shard_units(self) -> tuple[ShardUnit, ...]:
        """What is sharded over the ranks, and in which pieces; everything else, the VAE above all, is whole on each."""
        return (ShardUnit(self.transformer, tuple(self.transformer.transformer_blocks)),)

    def compiled_forward(self, eager: BlockForward, compiled: BlockForward) -> BlockForward:
        """What a compiled block of the transformer calls. A family may keep some of the calls eager.

        Args:
            eager: the block's own forward.
            compiled: the same, compiled.
        """
        return compiled

    def freeze_all_but_transformer(self) -> None:
        """No gradient for the encoders; the transformer keeps what it has."""
        for name, child in self.named_children():
            if name != "transformer":
                child.requires_grad_(False).eval()

    def count_flops(self, flops: Flops, differentiated: Tensor) -> None:
        """Report a forward to `on_flops`, and its backward once a gradient arrives at `differentiated`.

        Args:
            flops: of both.
            differentiated: through which the backward enters, such as the forward's output.
        """
        listener = self.on_flops
        if listener is None:
            return
        listener(flops.forward)
        if differentiated.requires_grad:
            differentiated.register_hook(lambda _gradient: listener(flops.backward))
