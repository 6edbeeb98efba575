"""Counts live bytes and operations of code that runs on the meta device: no values, real shapes, real lifetimes.

Inside a `Meter`, floating-point tensors are on the meta device and hold nothing. Integers and masks stay on the CPU
with their values, because shapes depend on them. Every storage counts from the operation that makes it until nobody
holds it any more, autograd's saved tensors included: peaks follow the code that runs, not a formula.

Attention is replaced by a fused kernel's stand-in, which keeps queries, keys, values, the output and one number a row.
Operations are counted by the formulas of `torch.utils.flop_counter`, what is recomputed included: the doctor estimates
seconds. A run's own utilisation leaves recomputation out (`flow_rl.models.flops`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

META = torch.device("meta")
aten = torch.ops.aten
_READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
_INDEXING = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one call took, beyond what was live before it.

    Attributes:
        peak: bytes at the fullest moment.
        kept: bytes still live once the call is over, its result included.
        flops: floating-point operations of matrix products, convolutions and attention.
    """

    peak: int
    kept: int
    flops: float

    def deeper(self, other: Reading, steps: float) -> Reading:
        """The reading so many steps beyond `other`, where `other` is one step beyond this one and all grow evenly."""

        def at(one: float, two: float) -> float:
            return two + steps * (two - one)

        return Reading(
            peak=int(at(self.peak, other.peak)),
            kept=int(at(self.kept, other.kept)),
            flops=at(self.flops, other.flops),
        )


def hollow(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device=META)


class Meter(TorchDispatchMode):
    """Live bytes of what is made inside; use `metered` to enter.

    Attributes:
        live: bytes now.
        peak: highest `live` since the last `read`.
        flops: operations since the last `read`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = 0.0
        self._held: dict[int, int] = {}

    def disregard(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these tensors or views of them: weights, gradients."""
        for tensor in tensors:
            self._hold(tensor, size=0)

    def read(self, function: Callable[[], Any]) -> tuple[Any, Reading]:
        """Call `function` and say what it took; calls may nest.

        Returns:
            its result and the reading.
        """
        before, peak, flops = self.live, self.peak, self.flops
        self.peak, self.flops = before, 0.0
        result = function()
        reading = Reading(peak=self.peak - before, kept=self.live - before, flops=self.flops)
        self.peak, self.flops = max(peak, self.peak), flops + self.flops
        return result, reading

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS and args[0].is_meta:
            return 1 if func is _READS[0] else True
        result = _run(func, args, kwargs)
        flat = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        for tensor in flat:
            if tensor.is_meta:
                self._hold(tensor)
        if func._overloadpacket in flop_registry and flat and flat[0].is_meta:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result

    def _hold(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes() if size is None else size
        self.live += self._held[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.live -= self._held.pop(key)


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """The operation, with floats on the meta device and integers on the CPU."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    floats = [t for t in tensors if t.is_meta]
    if func is aten._to_copy.default:
        return _converted(args[0], kwargs)
    if func is aten.copy_.default and floats and not args[0].is_meta:
        return args[0]  # values that nobody has: what is there stays
    if floats:
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to(META), (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": META}
    result = func(*args, **kwargs)
    if _makes_numbers(func, tensors) and isinstance(result, Tensor) and result.is_meta and not _is_float(result):
        if floats:  # new_zeros and its kin: of a float's shape, but with values
            return getattr(torch, "ones" if "one" in func.__name__ else "zeros")(
                result.shape, dtype=result.dtype, device="cpu"
            )
        return func(*args, **{**kwargs, "device": torch.device("cpu")})
    return result


def _makes_numbers(func: Any, tensors: list[Tensor]) -> bool:
    return not tensors or func.__name__.split(".")[0] in ("new_zeros", "new_ones", "zeros_like", "ones_like")


def _converted(tensor: Tensor, kwargs: dict) -> Tensor:
    """`Tensor.to`: integers stay on the CPU, and so does what goes to the host, which holds no values there."""
    wanted = kwargs.get("device")
    dtype = kwargs.get("dtype") or tensor.dtype
    if tensor.is_meta:
        if wanted is not None and torch.device(wanted).type == "cpu":
            return torch.zeros((), dtype=dtype).expand(tensor.shape)  # on the host: not this device's memory
        return aten._to_copy.default(tensor, **kwargs)
    if wanted is not None and torch.device(wanted).type == "meta" and not _is_float(torch.empty(0, dtype=dtype)):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return aten._to_copy.default(tensor, **kwargs)


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as positions, whose number is known."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta:
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, meter: Meter) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        # A query's head reads one of keys and values, which several may share: as many as there are of queries.
        heads = query.shape[:-2].numel()
        ctx.meter, ctx.shapes = meter, [(1, heads, *tensor.shape[-2:]) for tensor in (query, key, value)]
        meter.flops += sdpa_flop_count(*ctx.shapes)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, output, _ = ctx.saved_tensors
        ctx.meter.flops += sdpa_backward_flop_count((1, *ctx.shapes[0][1:3], output.shape[-1]), *ctx.shapes)
        return (*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)), None)


@contextmanager
def _fused_attention(meter: Meter) -> Iterator[None]:
    """Attention keeps what a fused kernel keeps. Replaced by name: a mode would be off while a backward recomputes."""
    own = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_others: Any, **_named: Any) -> Tensor:
        return _Attention.apply(query, key, value, meter)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


@contextmanager
def metered() -> Iterator[Meter]:
    """Inside the block, what runs on the meta device is counted."""
    meter = Meter()
    with _fused_attention(meter), meter:
        yield meter
