"""Copies to a device which do not make the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


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
