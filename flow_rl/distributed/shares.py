"""Work that all ranks would do alike, shared out: each rank takes some rows, and all get all results, in order.

Shapes: R rows in all, r rows a rank, M samples a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flow_rl.distributed.gradients import exchange_device, world_size


@dataclass(frozen=True, kw_only=True)
class Share:
    """The rows that one rank takes.

    Every rank takes the same number of rows, `r = ceil(R / ranks)`. Where R does not divide, the last ranks repeat the
    last row. The repeats cost no time, since the other ranks compute meanwhile, and they keep the ranks in step: the
    forwards of a sharded text encoder match one by one without gathering it. Repeated rows are computed, but neither
    scored nor reported.

    Attributes:
        total: R, the number of rows in all.
        rows: this rank's rows, r of them, each in [0, R).
        own: how many of them, from the first on, are not repeats; 0 on a rank for which nothing is left.
    """

    total: int
    rows: tuple[int, ...]
    own: int

    @classmethod
    def of(cls, total: int) -> Share:
        """This rank's share of `total` rows, which must be the same number on every rank."""
        ranks = world_size()
        size = math.ceil(total / ranks)
        start = (dist.get_rank() if ranks > 1 else 0) * size
        rows = tuple(min(row, total - 1) for row in range(start, start + size))
        return cls(total=total, rows=rows, own=min(max(total - start, 0), size))

    def gather(self, values: Tensor) -> Tensor:
        """Collect what the ranks found. Every rank must ask, and all get the same.

        Args:
            values: of this rank's rows, shape (r M, ...), M samples of a row side by side.

        Returns:
            The values of all rows in their order, on the CPU, shape (R M, ...).
        """
        if not len(self.rows):
            return values.cpu()
        members = len(values) // len(self.rows)
        return gather_ranks(values)[: self.total * members]


def gather_ranks(values: Tensor) -> Tensor:
    """Rows (N, ...) of every rank, in the order of the ranks, on the CPU. Every rank must have N rows and ask.

    Args:
        values: of this rank, of any dtype (ids are gathered as the integers they are), on any device.
    """
    if world_size() == 1:
        return values.cpu()
    own = values.to(exchange_device()).contiguous()
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    return torch.cat([part.cpu() for part in gathered])


def gather_objects(value: Any) -> list[Any]:
    """A small picklable value of every rank, in the order of the ranks. Every rank must ask."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def raised_everywhere() -> Iterator[None]:
    """Where one rank raises an error inside the block, all ranks raise at its end.

    Without this, the other ranks would wait in their next collective for a rank that never comes. The block itself must
    not communicate between ranks.

    Raises:
        RuntimeError: on the ranks without an error of their own; it names a rank that has one, and the error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    told = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(told):
        if message is not None:
            raise RuntimeError(f"Rank {rank} failed, so all ranks stop. Its error: {message}")
