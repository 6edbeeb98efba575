"""Learning curves: the record, and reading them from TensorBoard event files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flow_rl.suggestions import nearest


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line over training.

    Attributes:
        name: title of the chart.
        x: positions, usually optimizer steps, ascending.
        y: values, same length; NaN leaves a gap.
        low: lower edge of a band around the line, same length; None for no band.
        high: upper edge of the band; given exactly when `low` is.
        x_label: what x counts.
        y_label: what y is, with its unit or range.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    x_label: str = "step"
    y_label: str = ""

    def __post_init__(self) -> None:
        lengths = {
            field: len(values)
            for field, values in (("x", self.x), ("y", self.y), ("low", self.low), ("high", self.high))
            if values is not None
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"Curve {self.name!r} needs one value a position; received lengths {lengths}.")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"Curve {self.name!r} has only one edge of its band; give both low and high, or neither.")
        if not any(math.isfinite(value) for value in self.y):
            raise ValueError(f"Curve {self.name!r} has no finite value to draw.")
        if not all(math.isfinite(value) for value in self.x):
            raise ValueError(f"Curve {self.name!r} has positions that are not finite.")


def read_tensorboard_curves(log_dir: str | Path, tags: Sequence[str] | Mapping[str, str]) -> list[Curve]:
    """Read scalar curves from the event files of one run.

    A resumed run leaves several event files whose steps overlap: the value written last wins.

    Args:
        log_dir: directory with the event files, or one above it if only one directory below it has any.
        tags: scalar tags, or a mapping from tag to the curve's title.

    Returns:
        One curve a tag, in the order of `tags`, x = the logged step.

    Raises:
        ValueError: no event files, event files of several runs, or a tag that was never logged.
    """
    # Imported here: it costs seconds, and whoever only rates or averages does not need it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    titles = dict(tags) if isinstance(tags, Mapping) else {tag: tag for tag in tags}
    events = EventAccumulator(str(_event_directory(Path(log_dir))), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    for tag in titles:
        if tag not in known:
            raise ValueError(
                f"No scalar {tag!r} was logged in {log_dir}.{nearest(tag, known)} Logged: {sorted(known)}."
            )
    return [_curve(events.Scalars(tag), title) for tag, title in titles.items()]


def _curve(scalars: Sequence, title: str) -> Curve:
    last = {event.step: event.value for event in sorted(scalars, key=lambda event: event.wall_time)}
    steps = sorted(last)
    return Curve(name=title, x=steps, y=[last[step] for step in steps])


def _event_directory(log_dir: Path) -> Path:
    if not log_dir.is_dir():
        raise ValueError(f"{log_dir} is not a directory; pass the directory that TensorBoard would be pointed at.")
    found = sorted({path.parent for path in log_dir.rglob("events.out.tfevents.*")})
    if log_dir in found:
        return log_dir
    if len(found) != 1:
        listing = ", ".join(str(path) for path in found) or "none"
        raise ValueError(
            f"Expected the event files of one run under {log_dir}, found: {listing}. Pass the run's own directory."
        )
    return found[0]
