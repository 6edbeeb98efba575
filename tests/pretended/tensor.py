"""A tensor that claims to be on cuda:0 while a CPU tensor holds its values.

To PyTorch's C++ code it is a CPU tensor: a wrapper that claimed CUDA there would make autograd ask for a driver. Only
Python sees the claim. An operation on wrappers runs on the tensors that they hold, and its results are wrapped again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tests.pretended.memory import LiveBytes
from tests.pretended.waits import here

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
#: with hollow values, floating-point tensors of more elements than this have none
SMALL = 4096

aten = torch.ops.aten
#: operations for which the host waits: a size or a Python value depends on data
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.equal.default: "equal",
    aten.is_nonzero.default: "bool",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.unique_dim.default: "unique",
    aten.bincount.default: "bincount",
    aten.multinomial.default: "multinomial",
}
READS = {aten.index.Tensor, aten._unsafe_index.Tensor}
WRITES = {
    aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default, aten._unsafe_index_put.default,
}  # fmt: skip
INDEXING = READS | WRITES


class MixedDevices(RuntimeError):
    """An operation on tensors of both devices, where CUDA would refuse."""


@dataclass
class State:
    """What the tensors of the pretended device report to.

    Attributes:
        hollow: whether large floating-point tensors have no values.
        memory: counts the bytes on the device.
        refused: what was refused: also what somebody caught.
        on_wait: called with the kind of every wait.
    """

    hollow: bool = False
    memory: LiveBytes = field(default_factory=LiveBytes)
    refused: list[str] = field(default_factory=list)
    on_wait: Callable[[str], None] = lambda kind: None


#: replaced by `device.pretended_cuda` while it is open
state = State()


class PretendedTensor(Tensor):
    """A tensor on the pretended device.

    Args:
        held: CPU tensor with the values, or a meta tensor if there are none.
        requires_grad: whether autograd follows it.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, /, requires_grad: bool = False, **attributes: object) -> Tensor:
        if attributes:  # accelerate makes a parameter anew, on the meta device, by its class and its attributes
            return nn.Parameter(held, requires_grad=requires_grad)
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=CPU, requires_grad=requires_grad,
        )  # fmt: skip
        self.held = held
        state.memory.see(held)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"PretendedTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendedTensor:
        copied = PretendedTensor(self.held.detach().clone(), self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _check_devices(function, args, kwargs)
        if function in WAITS and kwargs.get("output_size") is None:
            state.on_wait(WAITS[function])
        elif function in INDEXING:
            _see_index(function, args)
        result = _run(function, bare(args), {name: bare(value) for name, value in kwargs.items()})
        if function._schema.is_mutable:
            return _written(function, args, kwargs, result)
        # A view of an ordinary tensor is an ordinary tensor, in inference mode as well.
        ordinary = torch.is_inference_mode_enabled() and _is_view(function) and not args[0].is_inference()
        with torch.inference_mode(False) if ordinary else contextlib.nullcontext():
            if isinstance(result, Tensor):
                return PretendedTensor(result)
            return tree_map_only(Tensor, PretendedTensor, result)


def _is_view(function) -> bool:
    return any(made.alias_info is not None for made in function._schema.returns)


def bare(value: Any) -> Any:
    """The held tensors in place of the wrappers: arguments of an operation nest no deeper than lists."""
    if isinstance(value, PretendedTensor):
        return value.held
    if isinstance(value, (list, tuple)):
        return type(value)([bare(v) for v in value])
    return value


def is_hollow(tensor: Tensor) -> bool:
    """Whether a new tensor of this kind has no values on the device."""
    return state.hollow and tensor.is_floating_point() and tensor.numel() > SMALL


# --------------------------------------------------------------------------------------------- devices


def _check_devices(function, args, kwargs) -> None:
    """Refuse a mixture. Scalars and indices may be on the CPU; copies cross."""
    if function is aten.copy_.default:
        if isinstance(args[0], PretendedTensor) != isinstance(args[1], PretendedTensor):
            see_copy(
                to_device=isinstance(args[0], PretendedTensor),
                pinned=is_pinned(args[0]) or is_pinned(args[1]),
                non_blocking=len(args) > 2 and bool(args[2]),
            )
        return
    found = [*_tensors(args), *_tensors(kwargs.values())]
    if function in INDEXING:
        if isinstance(args[0], PretendedTensor):
            found = [args[0], *_tensors(args[2:])]  # indices of either device will do
        elif any(isinstance(index, PretendedTensor) for index in args[1]):
            _refuse(function, found)
    plain = [t for t in found if not isinstance(t, PretendedTensor) and t.dim() > 0]
    # The engine makes its zeros in C++, out of sight.
    if plain and not in_backward() and any(isinstance(t, PretendedTensor) and t.dim() > 0 for t in found):
        _refuse(function, found)


def _tensors(values) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def in_backward() -> bool:
    """Whether autograd's engine is at work in this thread."""
    return torch._C._current_graph_task_id() != -1


def _refuse(function, tensors: list[Tensor]) -> NoReturn:
    described = [f"{tuple(t.shape)} on {'cuda:0' if isinstance(t, PretendedTensor) else 'cpu'}" for t in tensors]
    refuse(f"{function} of {', '.join(described)}: all of them must be on one device.")


def refuse(why: str) -> NoReturn:
    """Raise, with the line of the project that is to blame, and remember it in case somebody catches it."""
    message = f"{here()}: {why}"
    state.refused.append(message)
    raise MixedDevices(message)


def see_copy(*, to_device: bool, pinned: bool, non_blocking: bool) -> None:
    """A copy between the devices: the host waits unless the copy is non-blocking and the memory on the CPU pinned."""
    if not (pinned and non_blocking):
        state.on_wait("h2d" if to_device else "d2h")


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU came out of `pin_memory`."""
    return getattr(tensor, "_pretended_pinned", False)


def _see_index(function, args) -> None:
    """Masks become indices, whose number the host waits for; indices on the CPU are copied to the device."""
    values = args[2] if function in WRITES else None
    indices = [index for index in args[1] if isinstance(index, Tensor)]
    # One mask and one value is a masked_fill.
    fills = values is not None and values.numel() == 1 and len(args[1]) == 1
    for index in indices:
        if index.dtype in (torch.bool, torch.uint8) and not fills:
            state.on_wait("mask")
        if not isinstance(index, PretendedTensor) and index.numel():
            state.on_wait("index from the CPU")


# --------------------------------------------------------------------------------------------- values


def _run(function, args, kwargs):
    if not state.hollow or not any(t.is_meta for t in [*_tensors(args), *_tensors(kwargs.values())]):
        return function(*args, **kwargs)
    return _run_hollow(function, args, kwargs)


def _run_hollow(function, args, kwargs):
    """An operation that has no values: shapes come out, and every decision that depends on a value is `yes` or 1."""
    first = args[0]
    if function is aten._local_scalar_dense.default:
        return 1.0 if first.is_floating_point() else 1
    if function in (aten.equal.default, aten.is_nonzero.default):
        return True
    if function is aten.copy_.default and not first.is_meta:
        return first  # nobody has the value
    if function in INDEXING:
        indices = []
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta:
                indices += index.nonzero(as_tuple=True)
            else:
                indices.append(index)
        args = (first, indices, *args[2:])
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("meta")}
    return function(*_on_meta(args), **{name: _on_meta(value) for name, value in kwargs.items()})


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, (list, tuple)):
        return type(value)([_on_meta(v) for v in value])
    return value


def _written(function, args, kwargs, result):
    """In-place and `out` operations return the very objects that they wrote to."""
    found = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[position] if position < len(args) else kwargs.get(argument.name))
    if not function._schema.returns or not found:
        return result
    return found[0] if len(found) == 1 and len(function._schema.returns) == 1 else tuple(found)
