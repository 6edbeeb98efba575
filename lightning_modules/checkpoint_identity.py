"""What a checkpoint stands for: its module, its base by content, its adapter and its average.

A checkpoint holds trained weights alone. On another base, or with another adapter, they are another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flow_rl.models.base_digest import WHOLE, base_digests
from flow_rl.models.stored import local_directory

if TYPE_CHECKING:
    from lightning_modules.base import TrainedModule

#: of a checkpoint
KEY = "flow_rl"
#: the average's weights, where the callbacks' states are not in a checkpoint
AVERAGE = "average"
#: in the key of the callback that keeps the average
AVERAGE_CALLBACK = "WeightEMA"


def digests_of(path: str) -> dict[str, str]:
    """See `base_digests`; of a directory or a hub id."""
    return base_digests(local_directory(path))


def describe(module: TrainedModule) -> dict[str, Any]:
    """What a checkpoint of this module says of itself; plain values."""
    return {
        "module": type(module).__name__,
        "base": {"path": str(module.base_path), "digests": module.base_digests},
        "adapter": None if module.lora is None else {"rank": module.lora.rank, "alpha": module.lora.alpha},
        "settings": dict(module.weight_settings),
        "averaged": module.average is not None,
    }


def check_belongs(module: TrainedModule, checkpoint: Mapping[str, Any], path: str, *, fits: bool) -> None:
    """Refuse a checkpoint that would stand for other weights on this module than those that were trained.

    Args:
        module: before or after it loads its model.
        checkpoint: its content; tensors are not looked at.
        path: of the checkpoint, for the message.
        fits: whether training resumes from it; otherwise its weights are evaluated.

    Raises:
        ValueError: naming what was received and what was expected.
    """
    known = checkpoint.get(KEY)
    if not isinstance(known, Mapping):
        raise ValueError(
            f"'{path}' does not say which base and adapter it was trained with: it is no checkpoint of this project "
            "or one of an earlier version. Evaluate its export (--model.model_path) in its place."
        )
    own = describe(module)
    if known["module"] != own["module"]:
        raise ValueError(f"'{path}' is a checkpoint of {known['module']}, and this run trains {own['module']}.")
    if known["adapter"] != own["adapter"]:
        raise ValueError(
            f"'{path}' was trained with {_adapter(known['adapter'])}, and this run has {_adapter(own['adapter'])}: its "
            "weights would stand for another model. Give the run the checkpoint's setting of model.lora "
            f"({_setting(known['adapter'])})."
        )
    for name, value in known["settings"].items():
        if own["settings"].get(name) != value:
            raise ValueError(
                f"'{path}' was trained with model.{name} = {value}, and this run has {own['settings'].get(name)}. "
                f"Set --model.{name}={value}."
            )
    _check_base(module, known["base"], path, fits=fits)
    if fits and known["averaged"] and not _keeps_average(module):
        raise ValueError(
            f"'{path}' has an average of the weights (callbacks.WeightEMA), which this run would drop. Keep "
            "callbacks.ema in the config."
        )


def _check_base(module: TrainedModule, base: Mapping[str, Any], path: str, *, fits: bool) -> None:
    own, replaced = module.base_digests, module.replaced_components
    for name, digest in base["digests"].items():
        if own.get(name) == digest or (not fits and name in replaced):
            continue
        part = "the model" if name == WHOLE else f"the {name}"
        found = f"has other weights in {part} ({own[name]})" if name in own else f"has no weights of {part}"
        raise ValueError(
            f"'{path}' was trained on a base whose {part.removeprefix('the ')} is {digest} (then at '{base['path']}'), "
            f"and '{module.base_path}' {found}. Set model.model_path to the base that the checkpoint was trained on."
        )


def _keeps_average(module: TrainedModule) -> bool:
    trainer = module._trainer
    return trainer is None or any(AVERAGE_CALLBACK in type(c).__name__ for c in trainer.callbacks)


def averaged_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The average of the weights in a checkpoint, by parameter name; None where it has none."""
    if not checkpoint.get(KEY, {}).get("averaged"):
        return None
    if AVERAGE in checkpoint:
        weights: Mapping[str, Any] = checkpoint[AVERAGE]
        return weights
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if AVERAGE_CALLBACK in key]
    if not states or "weights" not in states[0]:
        raise ValueError("The checkpoint says that it has an average of the weights (WeightEMA), and has none.")
    found: Mapping[str, Any] = states[0]["weights"]
    return found


def check_names(module: TrainedModule, state: Mapping[str, Any]) -> None:
    """Refuse weights that are not those that the module trains.

    Raises:
        ValueError: naming one that is missing, or that the module does not train.
    """
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    missing, unknown = trained - state.keys(), state.keys() - trained
    if missing or unknown:
        said = [f"lacks {len(missing)} of the trained weights (such as {min(missing)})"] if missing else []
        said += [f"has {len(unknown)} that are not trained here (such as {min(unknown)})"] if unknown else []
        raise ValueError(
            f"The checkpoint {' and '.join(said)}: it was made with other settings of the model, such as model.lora."
        )


def _adapter(adapter: Mapping[str, Any] | None) -> str:
    return "no adapter" if adapter is None else f"an adapter of rank {adapter['rank']} and alpha {adapter['alpha']}"


def _setting(adapter: Mapping[str, Any] | None) -> str:
    if adapter is None:
        return "--model.lora=null"
    return f"--model.lora.rank={adapter['rank']} --model.lora.alpha={adapter['alpha']}, or configs/adapter/lora.yaml"
