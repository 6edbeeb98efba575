"""Room on the device for one of several frozen transformers, whose weights wait on the CPU.

They are copied in when due, on a stream of their own, so that the copy hides behind other work. Where a transformer is
spread over the ranks, so are the weights that wait, and a rank has its piece of each alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flow_rl.distributed.sharding import release

Weights = Mapping[str, Tensor]


class TeacherSlot:
    """One frozen transformer that takes on the weights of several.

    Args:
        transformer: any of them, on the CPU.
        weights: the tensors of each on the CPU, by key; all with the transformer's names and shapes.
        offload: copy into tensors that stay on the device; False points at the CPU tensors, which moves nothing; None
            decides by the device.
    """

    def __init__(self, transformer: nn.Module, weights: Mapping[str, Weights], *, offload: bool | None = None) -> None:
        self.transformer = transformer.requires_grad_(False).eval()
        #: of a transformer that is spread over the ranks, what this one holds; the weights are such pieces, too
        self._shards = {n: t.to_local() for n, t in base_tensors(transformer).items() if isinstance(t, DTensor)}
        self.loaded: str | None = None
        #: how often another teacher's weights came in
        self.moves = 0
        self._weights = {key: dict(tensors) for key, tensors in weights.items()}
        self._offload = True if self._shards else offload
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        self._own_storage = False

    @property
    def bytes_on_device(self) -> int:
        """Memory that teachers hold on this rank's device, however many there are."""
        held = (p.to_local() if isinstance(p, DTensor) else p for p in self.transformer.parameters())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def bytes_waiting(self) -> int:
        """Memory that the weights of all teachers take on this rank's host."""
        return sum(t.numel() * t.element_size() for weights in self._weights.values() for t in weights.values())

    def place(self, device: torch.device) -> None:
        """Make room on the device, once. Shards stay where they rest, which may be the host."""
        device = next((shard.device for shard in self._shards.values()), torch.device(device))
        offload = device.type != "cpu" if self._offload is None else self._offload
        if device == self._device and offload == self._own_storage:
            return
        with torch.inference_mode(False), torch.no_grad():
            if not self._shards:  # those are where they belong
                if offload:  # tensors of its own, to be overwritten: the ones on the CPU must stay as they are
                    for tensor in self._tensors().values():
                        tensor.data = torch.empty_like(tensor, device=device)
                self.transformer.to(device)
            if device.type == "cuda":
                self._stream = torch.cuda.Stream(device)
                pinned = {key: {n: t.pin_memory() for n, t in w.items()} for key, w in self._weights.items()}
                self._weights = pinned
        self._device, self._own_storage, self.loaded = device, offload, None

    def prefetch(self, key: str) -> None:
        """Start bringing in the weights of `key`; returns at once. The present ones must not be needed any more."""
        if key == self.loaded:
            return
        self.loaded, self.moves = key, self.moves + 1
        if self._stream is not None:  # what still reads the old weights comes first
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            if any(tensor.device.type == "cpu" for tensor in self._tensors().values()):
                # Shards that rest on the host are overwritten by the host, which no stream holds back.
                torch.cuda.current_stream(self._device).synchronize()
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            release(self.transformer)  # whole weights that a forward left are those of another teacher
            for name, tensor in self._tensors().items():
                if self._own_storage:
                    tensor.copy_(self._weights[key][name], non_blocking=True)
                else:
                    tensor.data = self._weights[key][name]

    def ready(self, key: str) -> None:
        """Bring in the weights of `key` unless they are there, and wait for them."""
        self.prefetch(key)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _tensors(self) -> dict[str, Tensor]:
        """What differs between teachers, under its name without adapters."""
        return self._shards or base_tensors(self.transformer)


def base_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a transformer without its adapters, by the names they had before any."""
    named = chain(transformer.named_parameters(), transformer.named_buffers())
    return {name.replace(".base_layer", ""): tensor for name, tensor in named if ".lora_" not in name}
