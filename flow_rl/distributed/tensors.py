"""Tensors that are sharded over ranks (DTensors), and the ones that are not, through the same code.

FSDP2 cuts every parameter along its first dimension into as many chunks as there are ranks, the way `torch.chunk`
does. That rule alone says which piece a rank holds, so tensors move between any numbers of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

#: key of the one entry of a mapping that stands for a tensor kept elsewhere
_REFERENCE = "tensor kept in shards"


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one, gathered (every rank must ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's chunk of a whole tensor along its first dimension; empty where there are fewer chunks than ranks."""
    chunks, rank = tensor.chunk(mesh.size(), dim=0), mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def sharded(local: Tensor, size: torch.Size, mesh: DeviceMesh) -> DTensor:
    """A sharded tensor of that size from this rank's piece; nothing is communicated."""
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, whole or sharded, laid out as `target` is."""
    if isinstance(target, DTensor) == isinstance(value, DTensor):
        return value
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        return sharded(piece(value, mesh).clone().to(target.to_local().device), value.shape, mesh)
    return full(value)


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Overwrite a tensor with the values of another, each of them whole or sharded.

    Raises:
        ValueError: two shapes.
    """
    if target.shape != value.shape:
        raise ValueError(f"A tensor of shape {tuple(value.shape)} does not fit one of shape {tuple(target.shape)}.")
    value = like(value, target)
    if isinstance(target, DTensor) and isinstance(value, DTensor):
        target.to_local().copy_(value.to_local())
    else:
        target.copy_(value)


def set_apart(tree: Any) -> tuple[Any, dict[str, DTensor]]:
    """Cut the sharded tensors out of nested dicts, lists and tuples.

    Returns:
        (rest, tensors): the same tree with a reference in place of each, and the tensors by their place in it.
    """
    tensors: dict[str, DTensor] = {}

    def cut(leaf: Any, place: str) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        tensors[place] = leaf
        return {_REFERENCE: place}

    return _mapped(tree, cut), tensors


def references(tree: Any) -> list[str]:
    """Places of the tensors that `set_apart` cut out."""
    found: list[str] = []
    _mapped(tree, lambda leaf, place: leaf, found.append)
    return found


def put_back(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `set_apart`; a place without a tensor stays a reference."""

    def fill(place: str) -> Any:
        return tensors.get(place, {_REFERENCE: place})

    return _mapped(tree, lambda leaf, place: leaf, fill)


def gathered_tree(tree: Any, *, keep: bool) -> Any:
    """The tree with every sharded tensor whole and on the CPU; every rank must ask, those that don't keep get None."""

    def gather(leaf: Any, place: str) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        whole = leaf.full_tensor()
        return whole.cpu() if keep else None

    return _mapped(tree, gather)


def _mapped(
    tree: Any, leaf: Callable[[Any, str], Any], reference: Callable[[str], Any] | None = None, place: str = ""
) -> Any:
    if isinstance(tree, dict):
        if reference is not None and tree.keys() == {_REFERENCE}:
            return reference(tree[_REFERENCE])
        return type(tree)((k, _mapped(v, leaf, reference, f"{place}/{k}")) for k, v in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(v, leaf, reference, f"{place}/{i}") for i, v in enumerate(tree))
    return leaf(tree, place)
