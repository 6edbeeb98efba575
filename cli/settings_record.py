"""What a checkpoint remembers of the settings of its run: every one of them, and the content of the files they name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flow_rl.rewards.fingerprints import digest_file

#: of a checkpoint
KEY = "run_settings"
#: in the record, before the name of a reward: what its scores depend on (`Reward.fingerprint`)
FINGERPRINT = "fingerprint of model.rewards."
#: in the record of a path: what is there
CONTENT = "content"
#: of command lines, which a run does not depend on
_NOT_OF_THE_RUN = ("config", "print_config", "ckpt_path", "weights_only", "verbose", "help")
#: sections whose settings may name files or folders that a run reads
_READ = ("model", "data", "callbacks")

Record = dict[str, Any]


class RecordedSettings(Callback):
    """Writes the settings of the run into its checkpoints. The command line adds it to every `fit`.

    Attributes:
        record: see `record_of`; empty until the run is about to start.
    """

    def __init__(self) -> None:
        self.record: Record = {}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.record:
            checkpoint[KEY] = self.record


def record_of(config: Mapping[str, Any], module: LightningModule) -> Record:
    """The settings of a run as one level of plain values.

    Args:
        config: of the subcommand, parsed: plain mappings.
        module: as built from it; the rewards that it trains on are recorded by their fingerprints.

    Returns:
        Values by setting, named as on the command line (`model.rollout.num_steps`). A path that exists is
        `{"path", "content"}`.
    """
    run = config.get("run") or {}
    folder = f"{run.get('dir')}/{run.get('name')}"
    found: Record = {}
    for section, value in config.items():
        if section not in _NOT_OF_THE_RUN:
            found |= {name: _leaf(name, leaf, folder) for name, leaf in _flat(section, value)}
    for name, reward in _trained_on(module).items():
        try:
            found[f"{FINGERPRINT}{name}"] = reward.fingerprint()
        except Exception:  # a reward of the user's own that can't be hashed is compared by its settings alone
            continue
    recorded: Record = json.loads(json.dumps(found, default=str))
    return recorded


def plain(config: Any) -> Any:
    """A parsed config with plain mappings and lists in the place of namespaces, all the way down."""
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    return [plain(item) for item in config] if isinstance(config, (list, tuple)) else config


def _trained_on(module: LightningModule) -> Mapping[str, Any]:
    from lightning_modules import GRPOPolicy  # knows the generators' libraries

    return module.rewards if isinstance(module, GRPOPolicy) else {}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name == "trainer.callbacks" and isinstance(value, list):
        value = _named(value)
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(name if key == "init_args" else f"{name}.{key}", inner)


def _named(callbacks: list[Any]) -> dict[str, Any]:
    """A list of callbacks by class, so that one more does not give all others another place."""
    named: dict[str, Any] = {}
    for callback in callbacks:
        name = str(callback.get("class_path") if isinstance(callback, Mapping) else callback).rpartition(".")[2]
        while name in named:
            name += "'"
        named[name] = callback
    return named


def _leaf(name: str, value: Any, folder: str) -> Any:
    if isinstance(value, list):
        return [_leaf(name, item, folder) for item in value]
    section = name.partition(".")[0]
    if not isinstance(value, (str, Path)) or not str(value):
        return value
    content = _content(Path(value), folders=section != "callbacks") if section in _READ else None
    if content is not None:
        return {"path": str(value), CONTENT: content}
    # What a run writes into its own folder is in the same place wherever that folder is.
    inside = section in ("trainer", "callbacks") and f"{value}/".startswith(f"{folder}/")
    return f"<run>{str(value).removeprefix(folder)}" if inside else value


def _content(path: Path, *, folders: bool) -> str | None:
    try:
        if path.is_file():
            return digest_file(path)
        if not folders or not path.is_dir():
            return None
        from flow_rl.models.base_digest import base_digests  # knows the generators' libraries

        return " ".join(f"{part} {found}" for part, found in base_digests(path).items()) or None
    except (OSError, ValueError):  # whoever reads it says what is wrong with it
        return None
