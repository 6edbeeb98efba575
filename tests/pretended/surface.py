"""Python calls that name a device, or take a tensor's values out: the pretended device answers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.pretended import tensor as pretended
from tests.pretended.tensor import CPU, CUDA, PretendedTensor, is_hollow, is_pinned, refuse, see_copy


def device_of(value: Any) -> torch.device:
    """The device that an argument names; every cuda is cuda:0."""
    device = CUDA if isinstance(value, int) else torch.device(value)
    return CUDA if device.type == "cuda" else device


class Moved(torch.autograd.Function):
    """A copy on the other device, with the gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_device: bool) -> Tensor:
        if to_device:
            held = tensor.detach().clone()
            return PretendedTensor(held.to("meta") if is_hollow(held) else held)
        held = tensor.held.detach()
        return torch.zeros(held.shape, dtype=held.dtype) if held.is_meta else held.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.held if isinstance(grad, PretendedTensor) else PretendedTensor(grad)), None


def move(tensor: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
    """What `tensor.to(device)` gives."""
    to_device = device == CUDA
    if isinstance(tensor, PretendedTensor) == to_device or tensor.is_meta:
        if tensor.is_meta and to_device:
            return PretendedTensor(tensor, tensor.requires_grad)
        return tensor
    see_copy(to_device=to_device, pinned=is_pinned(tensor), non_blocking=non_blocking)
    return Moved.apply(tensor, to_device)


class Surface(TorchFunctionMode):
    """Active while the pretended device is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = HANDLERS.get(function)
        if handler is not None:
            return handler(function, *args, **kwargs)
        if kwargs.get("device") is not None and function is not torch.device:
            return _made(function, args, kwargs)
        return function(*args, **kwargs)


def _made(function, args, kwargs):
    """A factory that names a device."""
    device = device_of(kwargs["device"])
    if device.type == "meta":
        return function(*args, **kwargs)
    made = function(*args, **{**kwargs, "device": CPU})
    if not isinstance(made, Tensor):
        return made
    if device == CUDA and not isinstance(made, PretendedTensor):
        held = made.detach()
        return PretendedTensor(held.to("meta") if is_hollow(held) else held, made.requires_grad)
    if device != CUDA and isinstance(made, PretendedTensor):  # `new_zeros(..., device="cpu")`, and the like
        held = made.held.detach()
        return torch.zeros(held.shape, dtype=held.dtype) if held.is_meta else held
    return made


def _device(function, tensor, *args):
    return CUDA if isinstance(tensor, PretendedTensor) else function(tensor, *args)


def _is_cuda(function, tensor, *args):
    return isinstance(tensor, PretendedTensor) or function(tensor, *args)


def _to(function, tensor, *args, **kwargs):
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    flags = [value for value in args if isinstance(value, bool)]  # non_blocking, then copy
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, (torch.device, str, int)) and not isinstance(value, bool):
            device = value
    non_blocking = kwargs.pop("non_blocking", flags[0] if flags else False)
    copy = kwargs.pop("copy", flags[1] if len(flags) > 1 else False)
    out = tensor
    if (dtype is not None and dtype != out.dtype) or kwargs:
        out = function(out, dtype or out.dtype, **kwargs)
    if device is not None:
        device = device_of(device)
        if device.type == "meta":
            return function(pretended.bare(out), "meta")
        out = move(out, device, non_blocking=non_blocking)
    return out.clone() if copy and out is tensor else out


def _cuda(function, tensor, device=None, non_blocking=False, **kwargs):
    return move(tensor, CUDA, non_blocking=non_blocking)


def _cpu(function, tensor, **kwargs):
    return move(tensor, CPU)


def _pin_memory(function, tensor, *args, **kwargs):
    pinned = tensor.clone()
    pinned._pretended_pinned = True
    return pinned


def _is_pinned(function, tensor, *args, **kwargs):
    return is_pinned(tensor)


def _tolist(function, tensor):
    if not isinstance(tensor, PretendedTensor):
        return function(tensor)
    pretended.state.on_wait("tolist")
    held = tensor.held
    return function(torch.zeros(held.shape, dtype=held.dtype) if held.is_meta else held)


def _numpy(function, tensor, *args, **kwargs):
    if isinstance(tensor, PretendedTensor):
        refuse(f"{function.__name__} of a tensor on cuda:0: copy it to the CPU first.")
    return function(tensor, *args, **kwargs)


def _reduce(function, tensor, *args):
    return function(tensor.held.detach() if isinstance(tensor, PretendedTensor) else tensor, *args)


def _set_data(function, tensor, value):
    with torch._C.DisableTorchFunction():
        if isinstance(tensor, PretendedTensor) != isinstance(value, PretendedTensor):
            # As on a real device, the tensor stays the same object.
            new = torch.nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else value
            torch.utils.swap_tensors(tensor, new)
            return
        function(tensor, value.detach())
        if isinstance(tensor, PretendedTensor):
            tensor.held = value.held


def _tensor(function, data, *args, **kwargs):
    """`torch.tensor` and its kin: scalars on the device inside a list are waited for, one by one."""
    device = kwargs.pop("device", None)
    wanted = None if device is None else device_of(device)
    if wanted is not None and wanted.type == "meta":
        # Libraries ask for the device of `torch.tensor([])` to see whether they build an empty model.
        return function(data, *args, **kwargs, device=wanted)
    if isinstance(data, Tensor):
        out = data if kwargs.get("dtype") is None else data.to(kwargs["dtype"])
        return move(out, wanted) if wanted is not None else out
    out = function(_values(data), *args, **kwargs)
    return out if wanted is None else move(out, wanted)


def _values(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return type(data)([_values(v) for v in data])
    return _tolist(Tensor.tolist, data) if isinstance(data, PretendedTensor) else data


def _pad_sequence(function, sequences, batch_first=False, padding_value=0.0, padding_side="right"):
    """C++ makes the result out of nothing, and so not on the device: here it comes from the sequences."""
    sequences, longest = list(sequences), max(len(s) for s in sequences)
    rows = []
    for sequence in sequences:
        padding = sequence.new_full((longest - len(sequence), *sequence.shape[1:]), padding_value)
        rows.append(torch.cat([sequence, padding] if padding_side == "right" else [padding, sequence]))
    return torch.stack(rows, dim=0 if batch_first else 1)


HANDLERS: dict[Callable, Callable] = {
    Tensor.device.__get__: _device,
    Tensor.is_cuda.__get__: _is_cuda,
    Tensor.data.__set__: _set_data,
    Tensor.to: _to,
    Tensor.cuda: _cuda,
    Tensor.cpu: _cpu,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: _is_pinned,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.__reduce_ex__: _reduce,
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    torch.asarray: _tensor,
    torch._C._nn.pad_sequence: _pad_sequence,
}
