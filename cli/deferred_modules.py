"""Modules that a start imports but rarely uses: each runs its own code when something of it is first asked for.

Lightning imports torchmetrics, whose `__init__` imports every metric, and with them torchvision, transformers and
scipy; Lightning itself uses the base classes alone. It imports torch's compiler to recognise compiled models. peft
imports bitsandbytes, which compiles functions and logs that it has no kernels, whether or not anything is quantised.
`install` makes these imports cheap: a deferred module is the module itself, not yet executed. What isn't installed is
missing at its import, as ever. Only the help of a subcommand uses this: it never comes to a computation.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import Any

from typing_extensions import override


@dataclass(frozen=True, kw_only=True)
class Deferral:
    """How a module is deferred.

    Attributes:
        places: names of the module that don't need all of it, each with the submodule that defines it.
        made: other names that don't need all of it, each with what stands for it.
        first: a submodule to import before any of those: the package's own order, which its circles rely on.
        whole: whether the module must have been executed before any submodule is.
    """

    places: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    first: str | None = None
    whole: bool = True


class _OfCompiler(type):
    """Answers `isinstance` for a class of torch's compiler: before that is executed, nothing is an instance."""

    @override
    def __instancecheck__(cls, instance: Any) -> bool:
        compiler = sys.modules["torch._dynamo"]
        return type(compiler) is not DeferredModule and isinstance(instance, compiler.OptimizedModule)


class OptimizedModule(metaclass=_OfCompiler):
    """Stands for the class that `torch.compile` returns: Lightning imports it only to recognise one."""


def _disable(function: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
    """`torch._dynamo.disable`; a function that `torch.compiler.disable` decorates waits for its first call."""
    if function is None or set(options) != {"reason"}:
        return _real("torch._dynamo").disable(function, *args, **options)
    from torch._compile import _disable_dynamo  # torch's own way to decorate without its compiler

    return _disable_dynamo(function, *args)


def _plot(*args: Any, **kwargs: Any) -> Any:
    return _real("torchmetrics.utilities.plot").plot_single_or_multi_val(*args, **kwargs)


#: what is deferred; a submodule of torchmetrics is complete without the package's `__init__`, which only gathers names
DEFERRALS: Mapping[str, Deferral] = {
    "torchmetrics": Deferral(
        places={
            "Metric": "torchmetrics.metric",
            "MetricCollection": "torchmetrics.collections",
            "MeanMetric": "torchmetrics.aggregation",
        },
        made={"_logger": logging.getLogger("torchmetrics")},
        first="torchmetrics.utilities",
        whole=False,
    ),
    # types for annotations, as torchmetrics itself has them without matplotlib
    "torchmetrics.utilities.plot": Deferral(
        made={"_AX_TYPE": object, "_PLOT_OUT_TYPE": tuple[object, object], "plot_single_or_multi_val": _plot}
    ),
    "torch._dynamo": Deferral(made={"OptimizedModule": OptimizedModule, "disable": _disable}),
    "bitsandbytes": Deferral(),  # registers its operators on import
}
WHOLE = tuple(name for name, deferral in DEFERRALS.items() if deferral.whole)
#: other names with two underscores say what a module is: to look at them executes nothing
EXECUTES = ("__all__",)


def install() -> None:
    """Defer the modules of `DEFERRALS` that nothing has imported yet; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class DeferredModule(ModuleType):
    """A module that has not been executed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in EXECUTES:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        deferral = DEFERRALS[self.__name__]
        if name in deferral.made:
            return deferral.made[name]
        if name in deferral.places:
            if deferral.first is not None:
                import_module(deferral.first)
            return getattr(import_module(deferral.places[name]), name)
        _execute(self)
        return getattr(self, name)


_executing = RLock()


def _real(name: str) -> ModuleType:
    _execute(sys.modules[name])
    return sys.modules[name]


def _execute(module: ModuleType) -> None:
    """Run the module's own code, once; a failure leaves it deferred, and the next use fails again."""
    with _executing:
        if type(module) is not DeferredModule:
            return  # another thread has done it, or it is being done further up
        module.__class__ = ModuleType
        try:
            assert isinstance(module.__loader__, _Deferred)
            module.__loader__.real.exec_module(module)
        except BaseException:
            module.__class__ = DeferredModule
            raise


class _Finder(MetaPathFinder):
    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in DEFERRALS:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _Deferred(spec.loader)
            return spec
        above = next((sys.modules.get(name) for name in WHOLE if fullname.startswith(f"{name}.")), None)
        if type(above) is not DeferredModule:
            return None
        _execute(above)
        # that may have imported the submodule, which must not be executed again
        return ModuleSpec(fullname, _Present()) if fullname in sys.modules else None


class _Deferred(Loader):
    """Makes a module that is executed later, by its real loader."""

    def __init__(self, real: Loader) -> None:
        self.real = real

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return DeferredModule(spec.name)

    @override
    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)  # sources and data files of the package


class _Present(Loader):
    """Hands out a module that is there."""

    @override
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = sys.modules[spec.name]
        self.spec = module.__spec__
        return module

    @override
    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
