"""Other weights than the live ones: the EMA, the old policy of NFT, and the reference from before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flow_rl.distributed.tensors import copy_into

if TYPE_CHECKING:
    from diffusers import ModelMixin


class ShadowWeights:
    """Copies of a module's trainable parameters that can be blended and swapped in.

    Elementwise on whatever tensors the parameters are, so it holds for the shards of a DTensor as well: nothing is
    gathered.

    Args:
        module: its parameters that require gradients are shadowed, starting from their present values.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._shadow = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """Shadow <- decay * shadow + (1 - decay) * live, with decay in [0, 1]."""
        self._follow()
        for name, live in self._live.items():
            self._shadow[name].lerp_(live.detach(), 1.0 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the shadow's values with the live ones, in place."""
        self._follow()
        for name, live in self._live.items():
            held = live.detach().clone()
            live.detach().copy_(self._shadow[name])
            self._shadow[name].copy_(held)

    def _follow(self) -> None:
        """Go where the parameters are: a shadow made before Lightning moved the module is left on the CPU."""
        for name, live in self._live.items():
            self._shadow[name] = self._shadow[name].to(live.device)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the shadow's values inside the block, whatever happens there."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow's tensors by parameter name."""
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: other parameters than the module's.
        """
        if state.keys() != self._shadow.keys():
            differing = sorted(state.keys() ^ self._shadow.keys())[:3]
            raise ValueError(
                f"The checkpoint's shadow weights belong to another set of trainable parameters (for example "
                f"{', '.join(differing)}). Was the run started with another model.lora setting?"
            )
        for name, tensor in state.items():
            copy_into(self._shadow[name], tensor)


class AdapterOff:
    """The weights from before training of a model that trains an adapter: the model without it, and no copy.

    Args:
        transformer: with an adapter that started as zero.
    """

    def __init__(self, transformer: ModelMixin) -> None:
        self._transformer = transformer

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes without its adapter inside the block, whatever happens there."""
        self._transformer.disable_adapters()
        try:
            yield
        finally:
            self._transformer.enable_adapters()

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the base comes back from where it was loaded."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


def reference_weights(transformer: ModelMixin, *, adapter: bool) -> ShadowWeights | AdapterOff:
    """What `transformer` is now, to be applied later: a copy of its trainable weights, or its adapter off.

    Args:
        transformer: before training.
        adapter: whether an adapter is what trains.
    """
    return AdapterOff(transformer) if adapter else ShadowWeights(transformer)
