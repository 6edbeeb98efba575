"""Bytes that the tensors on the pretended device hold: each storage once, without the allocator's rounding."""

from __future__ import annotations

import weakref

from torch import Tensor


class LiveBytes:
    """Counts storages from the moment they are seen until they are freed.

    Attributes:
        live: bytes held now.
        peak: largest number of bytes held since the last `reset_peak`.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._held: dict[int, tuple[int, weakref.ref]] = {}

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            size = storage.nbytes()
            self._held[key] = size, weakref.ref(storage, lambda _: self._freed(key))
            self.live += size
            self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        """Start a new peak at what is held now."""
        self.peak = self.live

    def _freed(self, key: int) -> None:
        size, _ = self._held.pop(key)
        self.live -= size
