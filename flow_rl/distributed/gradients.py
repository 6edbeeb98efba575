"""Gradients over all ranks: averaged, clipped, and looked at together.

Sharded gradients are averaged by FSDP2 while the backward pass runs. Those of whole parameters are averaged here,
once an optimizer step, after all micro-batches: no wrapper, and one all-reduce however many backwards there were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

#: bytes of gradients sent at a time
_BUCKET_BYTES = 64 * 2**20


def world_size() -> int:
    """Number of processes; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def finish_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Average over the ranks what is not averaged yet, and clip.

    Args:
        parameters: all trainable ones, in the same order on every rank; all of them sharded, or none.
        max_norm: largest norm of all gradients together.

    Returns:
        The norm before clipping, float32 scalar where the gradients are, the same on every rank; not finite if any
        gradient isn't.
    """
    trainable = list(parameters)
    average_gradients(trainable)
    norm = nn.utils.clip_grad_norm_(trainable, max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).detach().float()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean over the ranks of the gradients of whole parameters; where one rank has none, its gradient counts as 0."""
    if world_size() == 1:
        return
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    if not whole:
        return
    present = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32, device=whole[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, wanted in zip(whole, present.tolist(), strict=True):
        if wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients, of whole parameters or shards, where they are."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        gradient.mul_(factor)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to a size, in order: the same buckets on every rank."""
    bucket: list[Tensor] = []
    held = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        if bucket and (held + size > _BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += size
    if bucket:
        yield bucket


def finite_everywhere(*values: Tensor) -> bool:
    """Whether these numbers are finite on every rank: all ranks get the same answer, and must all ask.

    The host waits for the device once, however many numbers there are.
    """
    home = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
    bad = torch.stack([~torch.isfinite(value).all().to(home) for value in values]).any()
    return not any_rank(bad)


def any_rank(flag: bool | Tensor) -> bool:
    """Whether the flag is up on any rank: all ranks get the same answer, and must all ask.

    Args:
        flag: of this rank, a bool or a tensor with one.
    """
    if world_size() == 1:
        return bool(flag)
    vote = torch.as_tensor(flag, dtype=torch.int32, device=exchange_device())
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers of all ranks as one, in one message: the largest where a name ends in `_max`, else the mean.

    NaN says that a rank has none. Every rank must ask for the same names.
    """
    if world_size() == 1 or not values:
        return dict(values)
    own = torch.tensor(list(values.values()), dtype=torch.float64, device=exchange_device())
    each = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(each, own)
    found = torch.stack(each)
    means, largest = found.nanmean(dim=0).tolist(), found.nan_to_num(nan=float("-inf")).amax(dim=0).tolist()
    return {
        name: high if name.endswith("_max") else mean for name, mean, high in zip(values, means, largest, strict=True)
    }


def exchange_device() -> torch.device:
    """Where tensors must be for the ranks to exchange them."""
    return torch.device("cuda") if "nccl" in dist.get_backend_config() else torch.device("cpu")
