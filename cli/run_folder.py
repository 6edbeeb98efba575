"""Whose folder it is: no command writes among another one's files, and no two processes write into one folder.

`fit` writes into `<run.dir>/<run.name>`. `validate`, `test` and `predict` do so where nothing else is, and into a
folder of their own inside it where a training or another command has written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from jsonargparse import Namespace

from flow_rl.errors import SettingError
from flow_rl.files import replace_file, why_unwritable, writing
from strategies.checkpoint_files import newest_checkpoint

#: in a folder: which command writes there, and with which settings
RECORD = ".flow-rl-command.json"
#: held by the process that writes into a folder
LOCK = ".flow-rl-lock"
#: settings that change nothing of what an evaluation finds
_INDIFFERENT = ("config", "run.threads", "trainer.enable_progress_bar", "trainer.enable_model_summary")
EVALUATIONS = ("validate", "test", "predict")
#: owner of a folder without a record
UNKNOWN = "an unknown command"
_HELD: list[IO[str]] = []


def settings_digest(config: Mapping[str, Any], checkpoint: str | None) -> str:
    """What a command's results depend on, as one number.

    Args:
        config: the command's settings.
        checkpoint: the file or folder that is evaluated, followed by when it was written.
    """
    flat = {key: value for key, value in _flat(config) if not key.startswith(_INDIFFERENT) and key != "ckpt_path"}
    if checkpoint is not None:
        path = Path(checkpoint).resolve()
        flat["ckpt_path"] = f"{path} {path.stat().st_mtime_ns if path.exists() else 0}"
    return hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_fit(folder: Path, checkpoints: list[str], resumes_from: str | None) -> None:
    """Refuse to train into a folder that holds something else.

    Args:
        folder: of the run.
        checkpoints: directories where the run saves.
        resumes_from: the checkpoint that training starts from; None starts anew.

    Raises:
        SettingError: another command's records, or another training's checkpoints.
    """
    own, owner = newest_checkpoint(checkpoints), _owner(folder)
    inside = resumes_from is not None and Path(resumes_from).resolve().parent in [
        Path(d).resolve() for d in checkpoints
    ]
    unknown = owner == UNKNOWN and not inside and not _is_of_lightning(folder / "config.yaml")
    if unknown or owner in (*EVALUATIONS, "curate"):
        raise SettingError(
            f"'{folder}' holds the records of {owner}. Give this training another --run.name, or move that folder."
        )
    if own is not None and not inside:
        raise SettingError(
            f"'{folder}' holds another training, whose newest checkpoint is '{own}'. Resume it with --ckpt_path last, "
            "give this one another --run.name, or move that folder away."
        )


def folder_of_evaluation(folder: Path, command: str, digest: str) -> Path:
    """Where an evaluation writes: a folder that holds nothing, or the same evaluation's earlier records.

    Args:
        folder: of the run.
        command: `validate`, `test` or `predict`.
        digest: see `settings_digest`.

    Raises:
        SettingError: the folder holds the same command's records of other settings.
    """
    owner = _owner(folder)
    if owner is None or _is_same(folder, command, digest):
        return folder
    if owner == command:
        raise SettingError(
            f"'{folder}' holds the records of a `{command}` with other settings or of another checkpoint, which would "
            "be replaced. Give this one another --run.name, or move that folder."
        )
    for number in range(1, 10_000):
        place = folder / (command if number == 1 else f"{command}-{number}")
        if _owner(place) is None or _is_same(place, command, digest):
            return place
    raise SettingError(f"'{folder}' has no room for another `{command}`: move some of them away.")


def claim(folder: Path, command: str, digest: str) -> None:
    """Lock a folder for this process and write down whose it is.

    Raises:
        SettingError: another process writes there.
        CannotWrite: the disk refused.
    """
    advice = "It is the run directory: set --run.dir to another folder."
    lock(folder, "--run.name", advice=advice)
    record = {"command": command, "settings": digest}
    with writing(folder, advice=advice):
        replace_file(folder / RECORD, (json.dumps(record) + "\n").encode())


def claim_logs(folders: Iterable[Path], run: Path, command: str, digest: str, *, resumes: bool) -> list[Path]:
    """Claim the folders of loggers that lie outside of the run's: records, alerts and `config.yaml` go there.

    Args:
        folders: of loggers.
        run: the run's own folder, which is claimed by itself.
        command: that is about to write.
        digest: see `settings_digest`.
        resumes: whether a training resumes that has written there before.

    Returns:
        the folders that were claimed, which are locked now.

    Raises:
        SettingError: a folder holds what another command, or another training, wrote.
        CannotWrite: the disk refused.
    """
    outside = [f for f in dict.fromkeys(map(Path.resolve, folders)) if not f.is_relative_to(run.resolve())]
    for folder in outside:
        owner = _owner(folder)
        own = _is_same(folder, command, digest) or (resumes and owner == command)
        if owner is not None and not own:
            raise SettingError(
                f"The logger's folder '{folder}' holds the records of {owner}, among which this `{command}` would "
                "write. Set trainer.logger's save_dir, name or version to another folder, or move that one away."
            )
        claim(folder, command, digest)
    return outside


def lock(folder: Path, setting: str, *, advice: str | None = None) -> None:
    """Hold a folder until `release`, or until this process ends, however that comes.

    Args:
        folder: made if it is missing.
        setting: by which another one is chosen.
        advice: where the disk refuses; None says to change that setting.

    Raises:
        SettingError: another process holds it.
        CannotWrite: the disk refused.
    """
    with writing(folder, advice=advice or f"Set {setting} to another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise SettingError(
                f"{holder} is writing into '{folder}'. Wait until it has ended, stop it, or set {setting} to another."
            ) from None
        file.truncate(0)
        command = shlex.join(Path(part).name if not n else part for n, part in enumerate(sys.argv[:6]))
        file.write(f"Process {os.getpid()} on {socket.gethostname()} ({command[:160]})\n")
        file.flush()
        _HELD.append(file)


def release() -> None:
    """Give up all folders."""
    while _HELD:
        _HELD.pop().close()


def keep_former_config(folder: Path, name: str = "config.yaml") -> None:
    """Give the settings of the part of a run that is over a name of their own: a resumed one writes its own."""
    config = folder / name
    if not config.is_file():
        return
    former = sorted(folder.glob("config_[0-9]*.yaml"))
    if any(path.read_bytes() == config.read_bytes() for path in former):
        return
    with writing(folder):
        replace_file(folder / f"config_{len(former) + 1}.yaml", config.read_bytes())


def check_writable(folder: Path) -> None:
    """Find out now, not after an hour, that there is nowhere to write. Nothing is made.

    Raises:
        SettingError: the folder can't be made or written to.
    """
    if why := why_unwritable(folder):
        raise SettingError(f"Can't write to the run directory '{folder}': {why}. Set --run.dir to another folder.")


def redirected(config: Any, folder: Path, place: Path) -> None:
    """Have what a command's loggers and callbacks write go to another folder than the run's; checkpoints stay.

    Args:
        config: of a subcommand, parsed; changed in place.
        folder: of the run.
        place: inside it.
    """
    config.trainer.default_root_dir = str(place)
    for logger in _listed(config.trainer.logger):
        arguments = logger.get("init_args") if isinstance(logger, (Mapping, Namespace)) else None
        if arguments is not None and "version" in arguments:
            arguments["version"] = "/".join(filter(None, (arguments.get("version"), str(place.relative_to(folder)))))
    named = vars(config.get("callbacks") or Namespace()).values()
    for callback in (*named, *_listed(config.trainer.callbacks)):
        arguments = callback.get("init_args") if callback is not None else None
        directory = arguments.get("directory") if arguments is not None else None
        if directory is not None and (inside := Path(directory)).is_relative_to(folder):
            arguments["directory"] = str(place / inside.relative_to(folder))


def checkpoint_folders(config: Any) -> list[str]:
    """The directories that the checkpoint callbacks of a parsed config name."""
    named = vars(config.get("callbacks") or Namespace()).values()
    found = [c.get("init_args") for c in (*named, *_listed(config.trainer.callbacks)) if c is not None]
    return [arguments["dirpath"] for arguments in found if arguments is not None and arguments.get("dirpath")]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _owner(folder: Path) -> str | None:
    """The command that wrote a folder; None where there is nothing, or nothing but the folders of others."""
    if not folder.is_dir():
        return None
    record = _record(folder)
    if record is not None:
        return str(record.get("command"))
    # Earlier versions left no record; what they or a user left is nobody's to mix with.
    found = [p for p in folder.iterdir() if p.name != LOCK and not (p.is_dir() and (p / RECORD).is_file())]
    return UNKNOWN if found else None


def _is_of_lightning(config: Path) -> bool:
    """Whether there is no such file, or one that a run of an earlier version wrote."""
    try:
        return not config.exists() or config.read_text(encoding="utf-8").startswith("# lightning")
    except (OSError, UnicodeDecodeError):
        return False


def _is_same(folder: Path, command: str, digest: str) -> bool:
    return _record(folder) == {"command": command, "settings": digest}


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(config, Mapping):
        return [pair for key, value in config.items() for pair in _flat(value, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), config)]
