"""Warnings of a run on several ranks, given once."""

from __future__ import annotations

import os
import warnings

import torch.distributed as dist

#: set by the programs that launch ranks
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def warn_on_first_rank(message: str) -> None:
    """Warn on the first rank alone, whether or not the process group exists yet."""
    if _rank() == 0:
        warnings.warn(message, stacklevel=3)


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(next((os.environ[name] for name in _RANK_VARIABLES if os.environ.get(name)), 0))


def rank_and_size() -> tuple[int, int]:
    """This process's place among those that a launcher has started to build the same run, and how many they are.

    Only launchers that set both `RANK` and `WORLD_SIZE`, as torchrun does, are known to start them all at once.
    """
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
        return int(rank), int(size)
    return 0, 1
