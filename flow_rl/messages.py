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
