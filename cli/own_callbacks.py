"""The callbacks that the command line adds to a run by itself."""

from __future__ import annotations

from lightning import Callback

from cli.output_checks import RoomOnDisk
from cli.settings_record import RecordedSettings


def own_callbacks(command: str, settings: RecordedSettings) -> list[Callback]:
    """What looks at a run before it starts, and what its checkpoints record.

    Args:
        command: of the run.
        settings: writes the settings of a `fit` into its checkpoints.
    """
    if command == "fit":
        from callbacks.reward_trial import RewardTrial  # knows the generators' libraries

        return [RoomOnDisk(), RewardTrial(), settings]
    return [RoomOnDisk()] if command in ("test", "predict") else []
