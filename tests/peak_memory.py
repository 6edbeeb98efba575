"""How many bytes tensors hold at a time: counted, not measured."""

from __future__ import annotations

import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes that tensors seen in the block, and those given, held at a time; of shards, the piece."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for module in modules:
            for parameter in module.parameters():
                self._see(parameter)

    def _see(self, tensor: torch.Tensor) -> torch.Tensor:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if not local.is_meta and storage not in self._seen:
            self._seen[storage] = True
            weakref.finalize(storage, self._gone, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return tree_map_only(torch.Tensor, self._see, func(*args, **(kwargs or {})))
