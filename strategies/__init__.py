"""How a run is spread over ranks, and checkpoints that are complete or not there."""

from strategies.checkpoints import AtomicCheckpointIO
from strategies.fsdp2 import FSDP2Strategy, distribute, is_sharded_run
from strategies.replicated import ReplicatedStrategy

__all__ = ["AtomicCheckpointIO", "FSDP2Strategy", "ReplicatedStrategy", "distribute", "is_sharded_run"]
