"""Start ranks as gloo processes on the CPU, and look at what they leave behind.

The processes fork from one server that has imported everything (`imported.py`): a launch costs a fork, not ten seconds
of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

#: how many times slower than it should be the machine may be
PATIENCE = float(os.environ.get("DIST_PATIENCE", "1"))
#: seconds that a rank waits for the others: a hang becomes a failure
GROUP_TIMEOUT = 60.0 * PATIENCE
#: what Lightning and torch read about the ranks; a test run may itself be started by a launcher
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.dist.imported"])


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def start(function: Callable[..., None], world_size: int, *arguments: Any) -> list[BaseProcess]:
    """Run `function(*arguments)` in so many ranks."""
    _start_server()
    port = free_port()
    ranks = [
        _context.Process(target=_rank, args=(function, rank, world_size, port, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _start_server() -> None:
    """The server is a fresh interpreter that passes over what it cannot import: it must look where this one looks."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()


def finish(ranks: Sequence[BaseProcess], *, within: float = 120.0) -> list[int]:
    """Wait for all ranks; exit codes, negative for a signal. Those that are still there are killed, with a failure."""
    deadline = time.monotonic() + within * PATIENCE
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(ranks)} ranks were still running after {within:g} s"
    return [process.exitcode for process in ranks]


def launch(function: Callable[..., None], world_size: int, *arguments: Any, within: float = 120.0) -> None:
    """Run to the end, which must be a good one on every rank."""
    codes = finish(start(function, world_size, *arguments), within=within)
    assert codes == [0] * world_size, f"exit codes {codes}"


def _rank(function: Callable[..., None], rank: int, world_size: int, port: int, arguments: tuple) -> None:
    import torch

    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    function(*arguments)
