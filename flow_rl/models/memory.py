"""In which precision a generator holds its weights: what trains in float32, what is frozen in fewer bits if asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, Self

import torch

FrozenDtype = Literal["float32", "bfloat16"]
FROZEN_DTYPES: dict[FrozenDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class WeightDtypes:
    """The dtype that each component is loaded and kept in.

    Weights are never loaded in another dtype first: a transformer of 7 billion parameters that passed through float32
    would take 28 GB of host memory a process to end up as 14. Buffers, such as rotary tables, are float32 throughout.

    Attributes:
        transformer: of the denoiser's weights, without adapters.
        text_encoder: of the text encoder's weights.
        vae: of the image decoder's weights.
    """

    transformer: torch.dtype = torch.float32
    text_encoder: torch.dtype = torch.float32
    vae: torch.dtype = torch.float32

    @classmethod
    def kept(cls, frozen_dtype: FrozenDtype, *, adapter: bool) -> Self:
        """The dtypes of a generator whose transformer is trained.

        The VAE stays in float32 in any case: it is small, and rounding it would change every reward.

        Args:
            frozen_dtype: of the text encoder and, under an adapter, of the transformer.
            adapter: whether an adapter trains in the transformer's place; without one its own weights train, and
                AdamW's small updates would be rounded away in bfloat16.
        """
        frozen = FROZEN_DTYPES[frozen_dtype]
        return cls(transformer=frozen if adapter else torch.float32, text_encoder=frozen)

    def by_component(self) -> dict[str, torch.dtype]:
        """As diffusers' `from_pretrained` takes them; components of other names are float32."""
        return {**asdict(self), "default": torch.float32}
