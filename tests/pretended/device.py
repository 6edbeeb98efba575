"""The pretended device as a context manager: inside it `torch.cuda` is there, after it everything is as it was."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.pretended import tensor as pretended
from tests.pretended.surface import Surface
from tests.pretended.tensor import CUDA, State

#: bytes that the pretended device says it has
TOTAL_BYTES = 80 * 10**9
#: in the names of functions that remember what devices there are
_ABOUT_DEVICES = ("available", "cuda", "device", "accelerator")


class PretendedEvent:
    """Stands in for `torch.cuda.Event`: what was recorded is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pretended.state.on_wait("synchronize")

    def elapsed_time(self, end: PretendedEvent) -> float:
        if self._time is None or end._time is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end._time - self._time) * 1e3


class PretendedStream:
    """Stands in for `torch.cuda.Stream`: everything happens in the order in which Python says it."""

    device = CUDA

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> PretendedStream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: PretendedEvent | None = None) -> PretendedEvent:
        event = event or PretendedEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pretended.state.on_wait("synchronize")


def _synchronize(*args: Any) -> None:
    pretended.state.on_wait("synchronize")


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _always(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _replacements() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Attributes to replace, by the module that has them."""
    memory = pretended.state.memory
    properties = SimpleNamespace(
        name="pretended", total_memory=TOTAL_BYTES, major=9, minor=0, multi_processor_count=132
    )
    yield torch.cuda, {
        "_lazy_init": _nothing, "is_available": _always(True), "is_initialized": _always(True),
        "device_count": _always(1), "current_device": _always(0), "set_device": _nothing,
        "synchronize": _synchronize, "empty_cache": _nothing, "Stream": PretendedStream, "Event": PretendedEvent,
        "current_stream": lambda *a: PretendedStream(), "default_stream": lambda *a: PretendedStream(),
        "stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
        "get_rng_state": _always(torch.zeros(16, dtype=torch.uint8)), "set_rng_state": _nothing,
        "manual_seed": _nothing, "manual_seed_all": _nothing, "get_device_capability": _always((9, 0)),
        "get_device_name": _always("pretended"), "get_device_properties": _always(properties),
        "is_bf16_supported": _always(True), "memory_allocated": lambda *a: memory.live,
        "memory_reserved": lambda *a: memory.live, "max_memory_allocated": lambda *a: memory.peak,
        "max_memory_reserved": lambda *a: memory.peak, "reset_peak_memory_stats": lambda *a: memory.reset_peak(),
        "mem_get_info": lambda *a: (TOTAL_BYTES - memory.live, TOTAL_BYTES), "memory_stats": _always({}),
        "ipc_collect": _nothing,
    }  # fmt: skip
    yield torch.accelerator, {
        "is_available": _always(True), "device_count": _always(1), "current_device_index": _always(0),
        "current_accelerator": _always(torch.device("cuda")), "current_stream": lambda *a: PretendedStream(),
        "synchronize": _synchronize,
    }  # fmt: skip
    # Fused and multi-tensor kernels are chosen by device. The plain ones compute the same.
    yield torch.optim.Optimizer, {"_accelerator_graph_capture_health_check": _nothing}
    yield torch.nn.utils.clip_grad, {
        "_has_foreach_support": _always(False), "_device_has_foreach_support": _always(False),
    }  # fmt: skip
    yield torch.autocast, {"__init__": _autocast(torch.autocast.__init__)}
    yield torch.autograd, {"_engine_run_backward": _backward(torch.autograd._engine_run_backward)}


def _autocast(own):
    """In C++ the tensors are the CPU's, and so is the autocast that they see."""

    @functools.wraps(own)
    def init(self, device_type, *args, **kwargs):
        own(self, "cpu" if str(device_type).startswith("cuda") else device_type, *args, **kwargs)

    return init


def _backward(own):
    """A mode is off while it handles `Tensor.backward`, but blocks are recomputed inside."""

    @functools.wraps(own)
    def run(*args, **kwargs):
        with Surface():
            return own(*args, **kwargs)

    return run


def _forget_answers() -> None:
    """Libraries remember whether there is a GPU: let them ask again."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if type(value) is functools._lru_cache_wrapper and any(word in name for word in _ABOUT_DEVICES):
                value.cache_clear()


@contextlib.contextmanager
def pretended_cuda(*, hollow: bool = False) -> Iterator[State]:
    """A pretended cuda:0 in this thread, for as long as the block lasts.

    Args:
        hollow: large floating-point tensors on the device have no values. Integers and masks keep theirs, so shapes
            that depend on data are right.

    Yields:
        the bytes on the device, and where to say who listens to waits.
    """
    before = pretended.state
    pretended.state = State(hollow=hollow)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as undo:
        undo.callback(_forget_answers)
        undo.callback(setattr, pretended, "state", before)
        for owner, attributes in _replacements():
            undo.enter_context(mock.patch.multiple(owner, **attributes))
        # Transformers loads in threads of its own, which know nothing of the mode.
        undo.enter_context(mock.patch.dict("os.environ", {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        # `Module.to` then keeps the parameters' identity, as on a real device.
        torch.__future__.set_swap_module_params_on_conversion(True)
        undo.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        _forget_answers()
        undo.enter_context(Surface())
        yield pretended.state
