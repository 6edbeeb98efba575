"""All weights on every rank (DDP without its wrapper)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from strategies.checkpoints import AtomicCheckpointIO
from strategies.checks import check_sampler


class ReplicatedStrategy(DDPStrategy):
    """Every rank holds the whole model; `flow_rl.distributed.gradients` averages gradients once an optimizer step.

    DDP's wrapper reduces at every backward and expects each parameter once in it. A rollout step has many
    backwards, and shared prefixes use weights twice, so the wrapper is left out.

    Args:
        timeout: seconds that a rank waits for the others before the run is given up.
        process_group_backend: `nccl` or `gloo`; None takes what fits the accelerator.
    """

    def __init__(self, timeout: float = 1800.0, process_group_backend: str | None = None) -> None:
        super().__init__(
            checkpoint_io=AtomicCheckpointIO(),
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )

    @override
    def setup_environment(self) -> None:
        check_sampler(self.lightning_module.trainer)
        super().setup_environment()

    @override
    def configure_ddp(self) -> None:
        _sync_module_states(self.model)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)
