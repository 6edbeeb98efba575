"""What the hacking monitor saw of a training, from the files that it left."""

from __future__ import annotations

import json
from pathlib import Path

from flow_rl.evaluation import Curve, Watch
from flow_rl.evaluation.curves import read_tensorboard_curves

#: rewards and monitors on the monitor's panel
PROXY, PANEL = "monitor/proxy", "monitor/panel"


def watch_of(directory: Path) -> Watch | None:
    """The monitor's record of one training.

    Args:
        directory: of the run, with its event files and `alerts.jsonl`.

    Returns:
        None where no monitor looked twice, so that nothing can be compared.
    """
    try:
        proxy, panel = read_tensorboard_curves(directory, [PROXY, PANEL])
    except ValueError:  # a run without a monitor
        return None
    if len(proxy.x) < 2 or list(proxy.x) != list(panel.x):
        return None
    gap = [(r - proxy.y[0]) - (m - panel.y[0]) for r, m in zip(proxy.y, panel.y, strict=True)]
    alerts = directory / "alerts.jsonl"
    lines = alerts.read_text(encoding="utf-8").splitlines() if alerts.is_file() else []
    return Watch(
        looks=len(proxy.x),
        reward_change=proxy.y[-1] - proxy.y[0],
        monitor_change=panel.y[-1] - panel.y[0],
        alerts=[json.loads(line)["message"] for line in lines],
        gap=Curve(
            name=f"{directory.name}: rise of the reward beyond that of the monitors",
            x=proxy.x,
            y=gap,
            x_label="iteration",
            y_label="points of 1..5",
        ),
    )
