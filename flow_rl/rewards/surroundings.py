"""What a reward must leave as it found it: the samples it is shown, and the process that the run shares with it.

What can be undone is undone, and said once. What cannot be undone stops the run.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flow_rl.rewards.base import Reward, Samples

#: where a reward keeps the state of the random generators between its calls
_OWN = "_random_of_calls"


class Shown:
    """Samples on loan to a reward.

    Attributes:
        samples: what the reward gets. Its lists are copies, its images the caller's own.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = replace(samples, prompts=_copied(samples.prompts), categories=_copied(samples.categories))
        self._texts = (tuple(samples.prompts), tuple(samples.categories))
        self._pixels = [_Mark(tensor) for tensor in (samples.images, samples.sources) if tensor is not None]

    def changed(self) -> list[str]:
        """What the reward changed, in words."""
        names = [
            name
            for name, given in zip(("prompts", "categories"), self._texts, strict=True)
            if tuple(getattr(self.samples, name)) != given
        ]
        pixels = zip(("images", "sources"), self._pixels, strict=False)
        return [name for name, mark in pixels if mark.changed()] + names


def _copied(texts: Any) -> Any:
    return texts if isinstance(texts, tuple) else list(texts)


class _Mark:
    """Recognises a tensor that was written to.

    Torch counts its own writes. On the CPU others are possible, through numpy: there checksums are compared, too.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = self._count()
        self._sums = self._summed()

    def changed(self) -> bool:
        return self._count() != self._version or self._summed() != self._sums

    def _count(self) -> int:
        return 0 if self._tensor.is_inference() else self._tensor._version

    def _summed(self) -> list[int]:
        """A checksum an image: a gigabyte takes less than a second."""
        if type(self._tensor) is not Tensor or self._tensor.device.type != "cpu":
            return []
        plain = self._tensor.detach().contiguous().view(torch.uint8)
        return [zlib.adler32(image.numpy().reshape(-1)) for image in plain]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of the whole process.

    Attributes:
        name: for messages.
        read: its value.
        write: sets it to a value that was read.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _to_directory(path: str | None) -> None:
    if path is not None:
        os.chdir(path)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _handle(which: signal.Signals, handler: Any) -> None:
    if handler is not None:  # None is a handler that Python did not set, and cannot set again
        signal.signal(which, handler)


def _denormals_are_flushed() -> bool:
    return float(torch.tensor(2e-38, dtype=torch.float32, device="cpu") / 4) == 0


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_backend(name: str, value: bool) -> None:
    setattr(torch.backends.cudnn, name, value)


#: each thread has its own
OF_THREAD = (
    Setting(name="torch's default device", read=torch.get_default_device, write=_set_default_device),
    Setting(name="torch's grad mode", read=torch.is_grad_enabled, write=torch.set_grad_enabled),
    Setting(name="torch's flushing of denormals", read=_denormals_are_flushed, write=torch.set_flush_denormal),
)
#: of the whole process: a thread beside others cannot know who changed them
OF_PROCESS = (
    Setting(name="torch's default dtype", read=torch.get_default_dtype, write=torch.set_default_dtype),
    Setting(name="torch's number of threads", read=torch.get_num_threads, write=torch.set_num_threads),
    Setting(
        name="torch's precision of matrix products",
        read=torch.get_float32_matmul_precision,
        write=torch.set_float32_matmul_precision,
    ),
    Setting(
        name="torch's use of deterministic algorithms",
        read=_determinism,
        write=lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    Setting(
        name="torch.backends.cudnn.benchmark",
        read=lambda: torch.backends.cudnn.benchmark,
        write=lambda value: _set_backend("benchmark", value),
    ),
    Setting(name="numpy's handling of errors", read=np.geterr, write=lambda value: np.seterr(**value)),
    Setting(name="the working directory", read=_directory, write=_to_directory),
)
#: only the main thread may set them
HANDLERS = tuple(
    Setting(name=f"the handler of {which.name}", read=partial(signal.getsignal, which), write=partial(_handle, which))
    for which in (signal.SIGINT, signal.SIGTERM)
)


_this_thread = threading.local()


def computes_alone() -> None:
    """Say that this thread is the only one of the process that computes: what changes meanwhile, it changed."""
    _this_thread.alone = True


class ProcessState:
    """The settings and random generators of this process, as they were before a reward was asked.

    In the main thread, which waits for the reward, the reward draws from random generators of its own: they start from
    the run's state at its first call and continue at the next. Elsewhere the run may draw meanwhile, or change a
    setting of the process, and both are left alone.

    Args:
        reward: who is going to be asked.
        cuda: whether it may draw on a CUDA device.
    """

    def __init__(self, reward: Reward, *, cuda: bool) -> None:
        main = threading.current_thread() is threading.main_thread()
        alone = main or getattr(_this_thread, "alone", False)
        self._settings = OF_THREAD + (OF_PROCESS if alone else ()) + (HANDLERS if main else ())
        self._values = [setting.read() for setting in self._settings]
        self._reward = reward
        self._random = _RandomState.now(cuda=cuda) if main else None
        own = getattr(reward, "__dict__", {}).get(_OWN)
        if self._random is not None and isinstance(own, _RandomState):
            own.restore()
            self._began: _RandomState | None = own
        else:
            self._began = self._random

    def restore(self) -> list[str]:
        """Undo what the reward changed, and name it."""
        changed = []
        for setting, value in zip(self._settings, self._values, strict=True):
            if setting.read() != value:
                setting.write(value)
                changed.append(f"changed {setting.name}")
        if self._random is not None and self._began is not None:
            now = _RandomState.now(cuda=self._began.cuda is not None)
            if drew := self._began.differences(now):
                changed.append(f"drew from the global random generator of {' and '.join(drew)}")
                if hasattr(self._reward, "__dict__"):
                    self._reward.__dict__[_OWN] = now
            if drew or self._began is not self._random:
                self._random.restore()
        return changed


@dataclass(frozen=True, kw_only=True)
class OwnRandomState:
    """Where the random generators of a reward stand; None: it has not drawn from them yet."""

    state: Any

    def restore(self, reward: Reward) -> None:
        """Let the reward's next draw be what it would have been then."""
        kept = getattr(reward, "__dict__", {})
        if self.state is None:
            kept.pop(_OWN, None)
        else:
            kept[_OWN] = self.state


def own_random_state(reward: Reward) -> OwnRandomState:
    """Where the random generators stand that a reward draws from between its calls."""
    return OwnRandomState(state=getattr(reward, "__dict__", {}).get(_OWN))


@dataclass(frozen=True, kw_only=True, eq=False)
class _RandomState:
    """The states of the global random generators; `cuda` is None where no CUDA device was asked for."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, *, cuda: bool) -> _RandomState:
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),
            torch=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state() if cuda else None,
        )

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    def differences(self, other: _RandomState) -> list[str]:
        """Names of the libraries whose generator drew between the two."""
        drew = {
            "Python": self.python != other.python,
            "numpy": _plain_state(self.numpy) != _plain_state(other.numpy),
            "torch": not torch.equal(self.torch, other.torch),
            "CUDA": self.cuda is not None and other.cuda is not None and not torch.equal(self.cuda, other.cuda),
        }
        return [name for name, differs in drew.items() if differs]


def _plain_state(state: Any) -> tuple[Any, ...]:
    return tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in state)
