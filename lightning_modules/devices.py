"""Where a module computes, and copies to that device which do not make the host wait."""

from __future__ import annotations

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor


class ComputingModule(LightningModule):
    """Knows the device on which its model computes."""

    @property
    def compute_device(self) -> torch.device:
        """The device for inputs, latents and images.

        In a run it is the strategy's root device. `device`, or the device of a weight, is the wrong one to ask for:
        under FSDP2's CPU offload the weights rest on the CPU and compute on the GPU. Outside a run the module is where
        it was put.
        """
        trainer = self._trainer
        if trainer is not None and trainer.state.status == TrainerStatus.RUNNING:
            return trainer.strategy.root_device
        return self.device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device without waiting for what the device still has to do.

    A copy from ordinary host memory holds the host up until the device has reached it. A copy from pinned memory is
    queued like a kernel.

    Args:
        tensor: of any shape; returned unchanged if it is on the device already.
        device: where to put it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
