"""What a run needs of its settings, looked at before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flow_rl.errors import SettingError
from strategies.checkpoint_files import is_complete


def check_name(name: str | None) -> None:
    """Refuse a run without a folder of its own.

    Raises:
        SettingError: an empty name, or one that leads to run.dir itself or out of it.
    """
    parts = Path(name or "").parts
    if not parts or ".." in parts or Path(name or "").is_absolute():
        raise SettingError(
            f"run.name is '{name or ''}'; it must name a folder below run.dir. Set run.dir for another place."
        )


def check_seed(seed: int) -> None:
    """Refuse a seed before numpy does, which would not name the setting.

    Raises:
        SettingError: outside of what numpy and torch both take.
    """
    if not 0 <= seed < 2**32:
        raise SettingError(f"run.seed is {seed}; it must lie between 0 and {2**32 - 1}.")


def check_checkpoint(path: Any) -> None:
    """Refuse a checkpoint that isn't there; Lightning would look for it after loading the model.

    Raises:
        SettingError: neither `last` nor an existing file or directory.
    """
    if path is None or str(path) == "last" or is_complete(Path(path)):
        return
    if Path(path).exists():
        raise SettingError(
            f"'{path}' is no complete checkpoint: its save was cut short. --ckpt_path last finds the newest that is."
        )
    raise SettingError(f"No checkpoint '{path}'. --ckpt_path takes a path, or 'last' for the newest of this run.")
