"""How a run is spread over ranks, and checkpoints that are complete or not there; imported when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flow_rl.lazy_names import on_demand

if TYPE_CHECKING:
    from strategies.checkpoints import AtomicCheckpointIO
    from strategies.fsdp2 import FSDP2Strategy, distribute, is_sharded_run
    from strategies.replicated import ReplicatedStrategy

__all__ = ["AtomicCheckpointIO", "FSDP2Strategy", "ReplicatedStrategy", "distribute", "is_sharded_run"]
__getattr__, __dir__ = on_demand(
    __name__,
    {
        "AtomicCheckpointIO": "checkpoints",
        "FSDP2Strategy": "fsdp2",
        "ReplicatedStrategy": "replicated",
        "distribute": "fsdp2",
        "is_sharded_run": "fsdp2",
    },
)
