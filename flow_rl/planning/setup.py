"""What the doctor needs to know of a run: the objects built from its config, and the trainer's settings as written.

The trainer itself is not built: a plan for eight GPUs must be made on a machine that has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from flow_rl.batches import PromptData, TaskPrompts
from flow_rl.models.workload import Generator
from flow_rl.planning.demands import Average, Demands
from flow_rl.planning.stage import Profile, Stage

#: strategies (last part of the class path) that give each rank a share of weights, gradients and optimizer
SHARDING = ("FSDP2Strategy", "ModelParallelStrategy", "FSDPStrategy")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One run.

    Attributes:
        model: the stage, without weights.
        data: the datamodule; None where the config has none.
        trainer: the trainer's settings as written in the config.
        demands: of the callbacks, in their order.
        checkpoints: the callbacks that write checkpoints.
        callbacks: all callbacks by name.
        run_directory: where checkpoints are written.
        stage: `fit`, or `validate`, `test` or `predict`.
        changes: values that replace those of the config: `ranks`, `shards`, `offload`, `checkpointing`.
    """

    model: Stage
    data: Any
    trainer: Mapping[str, Any]
    demands: Sequence[Demands] = ()
    checkpoints: Sequence[Any] = ()
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    run_directory: str = ""
    stage: str = "fit"
    changes: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def profile(self) -> Profile:
        """What the stage says of itself."""
        return self.model.profile()

    @property
    def generator(self) -> Generator:
        """The generator of a stage that has one.

        Raises:
            ValueError: a stage without one.
        """
        if self.profile.generator is None:
            raise ValueError(f"{type(self.model).__name__} trains no image generator: its memory is not planned.")
        return self.profile.generator

    @property
    def prompts(self) -> PromptData | None:
        """The data, where they are prompts."""
        return self.data if isinstance(self.data, PromptData) else None

    @property
    def tasks(self) -> Mapping[str, TaskPrompts]:
        """The prompts of each task; none where the data are no prompts."""
        return {} if self.prompts is None else self.prompts.by_task()

    @property
    def averages(self) -> tuple[Average, ...]:
        """The averages of the trained weights that callbacks keep."""
        return tuple(average for demands in self.demands for average in demands.averages)

    @property
    def ranks(self) -> int:
        """Processes of the run: devices of a node times nodes. `auto` and -1 count as 1."""
        if "ranks" in self.changes:
            return int(self.changes["ranks"])
        devices = self.trainer.get("devices", 1)
        if isinstance(devices, (list, tuple)):
            devices = len(devices)
        count = int(devices) if str(devices).isdigit() else 1
        return max(1, count) * int(self.trainer.get("num_nodes") or 1)

    @property
    def strategy(self) -> str:
        """Name of the strategy's class, or what the config calls it."""
        strategy = self.trainer.get("strategy") or "auto"
        name: str = strategy if isinstance(strategy, str) else strategy.get("class_path", "auto")
        return name.rpartition(".")[2]

    def strategy_setting(self, name: str) -> Any:
        """A setting of the strategy by name; None where it has none."""
        strategy = self.trainer.get("strategy")
        return None if strategy is None or isinstance(strategy, str) else (strategy.get("init_args") or {}).get(name)

    @property
    def shards(self) -> int:
        """Over how many ranks weights, gradients and optimizer states are divided."""
        return int(self.changes.get("shards", self.ranks if self.strategy in SHARDING else 1))

    @property
    def offload(self) -> bool:
        """Whether shards rest in the memory of the host."""
        return bool(self.changes.get("offload", self.strategy_setting("cpu_offload")))

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass, by the stage's setting or the strategy's."""
        own = self.generator.gradient_checkpointing
        return bool(self.changes.get("checkpointing", own or self.strategy_setting("activation_checkpointing")))

    @property
    def gathered_dtype(self) -> torch.dtype | None:
        """What a forward casts all weights to, by a sharding strategy or mixed precision; None leaves them alone."""
        mixed = str(self.trainer.get("precision") or "").startswith("bf16")
        sharded = self.shards > 1 and self.strategy_setting("precision") in (None, "bfloat16")
        return torch.bfloat16 if mixed or sharded else None
