"""How exactly a device computes in float32."""

from __future__ import annotations

import torch


def allow_tf32() -> None:
    """Let CUDA multiply float32 matrices, and convolve, in TensorFloat-32: factors of 10 mantissa bits, float32 sums.

    Nothing changes on a CPU. `torch.set_float32_matmul_precision` would reach further: on CPUs with bfloat16
    instructions it lets matrix products there round as well.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
