"""Weights, gradients and optimizer spread over the ranks: FSDP2 under Lightning's model-parallel strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from flow_rl.distributed.loading import fill, in_units
from flow_rl.distributed.sharding import Layout, release, shard
from flow_rl.distributed.tensors import copy_into, gathered_tree, like
from flow_rl.models.shard_units import ShardUnit
from flow_rl.models.stored import WeightReader
from strategies.checkpoint_files import is_sharded_checkpoint, remove, save_file
from strategies.checkpoint_reading import read_file
from strategies.checkpoints import load_shards, save_shards
from strategies.checks import check_sampler, check_sharded_optimizer

#: in the name of the callback that keeps the average of the weights
AVERAGE = "WeightEMA"
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


class FSDP2Strategy(ModelParallelStrategy):
    """Shards what a model names as its units; a module asks for it in `configure_model` (see `distribute`).

    Args:
        precision: of weights and activations in a forward; shards, gradients and optimizer stay float32.
        activation_checkpointing: recompute the blocks' activations in the backward pass.
        cpu_offload: keep shards, gradients and optimizer in CPU memory.
        sharded_checkpoints: each rank writes its own pieces into a directory; false gathers one file on rank 0.
        timeout: seconds that a rank waits for the others before the run is given up.
        process_group_backend: `nccl` or `gloo`; None takes what fits the accelerator.
    """

    def __init__(
        self,
        precision: Literal["float32", "bfloat16"] = "bfloat16",
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        sharded_checkpoints: bool = True,
        timeout: float = 1800.0,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded_checkpoints,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self.compute_dtype = PRECISIONS[precision]
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload

    # ----------------------------------------------------------------- set-up

    @override
    def setup_environment(self) -> None:
        # Before any model loads: what can't work is refused, and all ranks make up one dimension.
        trainer = self.lightning_module.trainer
        check_sampler(trainer)
        check_sharded_optimizer(self.lightning_module)
        self._data_parallel_size = self.num_nodes * self.num_processes
        # Weights gathered in inference mode could not be trained on afterwards; Lightning knows that of FSDP1 alone.
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop
        ):  # fmt: skip
            loop.inference_mode = False
        super().setup_environment()

    @override
    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and self.cpu_offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # norms of gradients in CPU memory are summed there
        return super()._get_process_group_backend()

    @property
    def layout(self) -> Layout:
        """How weights are laid out over the ranks."""
        return Layout(
            mesh=self.device_mesh["data_parallel"], compute_dtype=self.compute_dtype, cpu_offload=self.cpu_offload
        )

    def shard(self, model: nn.Module, units: Sequence[ShardUnit], reader: WeightReader | None = None) -> None:
        """Shard the units of a model, whose parameters say by now whether they are trained.

        Args:
            model: with weights, or without any on the meta device.
            units: of the model.
            reader: fills the shards of a model without weights; None leaves them to the caller.
        """
        empty = any(p.is_meta for p in model.parameters())
        if self.activation_checkpointing:
            for unit in units:
                if any(p.requires_grad for p in unit.root.parameters()):
                    _checkpoint_activations(unit.root)
        shard(model, units, self.layout)
        if empty and reader is not None:
            fill(in_units(model, units), reader)

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        whole = [name for name, p in self.model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        assert not whole, f"trained but not sharded: {whole[:3]}"

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        # Lightning's modules and metrics say where they are by what they were last moved to, and most of this one is
        # moved by hand: whoever asks for `module.device` wants to compute there.
        _update_properties(self.model, device=self.root_device)
        for module in self.model.modules():
            if isinstance(module, Metric):
                module.to(self.root_device)
            for parameter in module.parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(self.root_device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)

    # ----------------------------------------------------------------- checkpoints

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained; frozen weights come back from where they were loaded."""
        release(self.lightning_module)  # whole weights that a forward left are no masters: they may be in bfloat16
        return {name: p.detach() for name, p in self.lightning_module.named_parameters() if p.requires_grad}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """By parameter number, as without sharding: the same on any number of ranks."""
        return _unwrapped(optimizer).state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            save_shards(checkpoint, path, is_first=self.is_global_zero, barrier=self.barrier)
            return
        whole = gathered_tree(checkpoint, keep=self.is_global_zero)
        if self.is_global_zero:
            save_file(whole, path)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if is_sharded_checkpoint(path):
            return load_shards(
                path,
                mesh=self.device_mesh["data_parallel"],
                skip=None if fitting else _of_training_alone,
            )
        return read_file(path, mmap=True)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = dict(self.lightning_module.named_parameters())
        state = checkpoint["state_dict"]
        missing = [name for name, p in own.items() if p.requires_grad and name not in state]
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} of the trained weights (such as {missing[0]}): it was made with "
                "other settings of the model."
            )
        for name, value in state.items():
            if name in own:
                copy_into(own[name], value)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            held = _unwrapped(optimizer)
            parameters = [p for group in held.param_groups for p in group["params"]]
            laid_out = {
                number: {
                    key: like(v, parameters[number]) if _follows(v, parameters[number]) else v
                    for key, v in values.items()
                }
                for number, values in state["state"].items()
            }
            held.load_state_dict({**state, "state": laid_out})

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            remove(filepath)


def is_sharded_run(module: LightningModule) -> bool:
    """Whether the run's strategy shards what a module asks it to: a model can then be built without its weights."""
    trainer = getattr(module, "_trainer", None)
    return trainer is not None and isinstance(trainer.strategy, FSDP2Strategy)


def distribute(
    module: LightningModule, model: nn.Module, units: Sequence[ShardUnit], reader: WeightReader | None = None
) -> bool:
    """Shard units of a model if the run's strategy shards.

    For `configure_model`, once it is known what is trained (adapters and all) and before anything is copied from the
    weights.

    Args:
        module: of the run, or of none.
        model: what the module trains.
        units: of the model.
        reader: of the weights, for a model that was built without them.

    Returns:
        Whether they are sharded now.
    """
    if not is_sharded_run(module):
        return False
    module.trainer.strategy.shard(model, units, reader)
    return True


def _of_training_alone(name: str) -> bool:
    """Whether an evaluation needs an entry of a checkpoint not at all; it does need the average of the weights."""
    return name == "optimizer_states" or (name.startswith("callbacks.") and AVERAGE not in name)


def _checkpoint_activations(root: nn.Module) -> None:
    """Recompute activations block by block, by the model's own switch (diffusers' or transformers')."""
    if hasattr(root, "enable_gradient_checkpointing"):
        root.enable_gradient_checkpointing()
    else:
        root.gradient_checkpointing_enable({"use_reentrant": False})


def _follows(value: Any, parameter: torch.Tensor) -> bool:
    """Whether a piece of optimizer state is laid out as its parameter."""
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
