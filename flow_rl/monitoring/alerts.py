"""What the hacking monitor says when it alerts, and the bands that it alerts at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flow_rl.monitoring.hacking import Band, Finding
from flow_rl.suggestions import nearest

# The honest demo run (160 iterations) changed them by +1 %, +2 %, +10 %, +17 %, -40 % and +31 %, in this order.
#: relative changes that training may make without an alert
BANDS = {
    "brightness": Band(low=-0.3, high=0.3),
    "saturation": Band(low=-0.5, high=0.5),
    "contrast": Band(low=-0.5, high=0.5),
    "sharpness": Band(low=-0.5, high=1.0),
    "diversity": Band(low=-0.65),
    "latent_rms": Band(low=-0.5, high=0.8),
}


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A line of `alerts.jsonl`.

    Attributes:
        iteration: iterations done when it was raised.
        kind: "hacking", or the measure that left its band.
        since: iterations done at the look it compares with.
        p: chance to see this much if nothing were wrong, corrected for the comparisons of one look.
        changes: mean changes since then: points of the 1..5 scale for hacking, relative for a measure.
        action: what the monitor was told to do.
        message: for people.
    """

    iteration: int
    kind: str
    since: int
    p: float
    changes: dict[str, float]
    action: str
    message: str

    @classmethod
    def of(cls, finding: Finding, *, iteration: int, since: int, action: str, band: Band | None) -> Alert:
        """The alert of a finding; a measure's with the band that it left."""
        if finding.kind == "hacking":
            title = "reward hacking suspected"
            what = (
                f"the training reward {_points(finding.changes['proxy'])} while the scorers that are not trained on "
                f"{_points(finding.changes['panel'])}"
            )
        else:
            assert band is not None, "a measure is outside of some band"
            title = "the pictures drift from the base's"
            what = (
                f"the mean {finding.kind} of the panel changed by {finding.changes[finding.kind]:+.0%} "
                f"(band {band.low:+.0%} to {band.high:+.0%})"
            )
        message = (
            f"Iteration {iteration}: {title}. Since iteration {since} {what}; p = {finding.p:.1g}. "
            f"Look at the sample grids. Action: {action}."
        )
        return cls(
            iteration=iteration,
            kind=finding.kind,
            since=since,
            p=finding.p,
            changes=dict(finding.changes),
            action=action,
            message=message,
        )


def bands_with_defaults(given: Mapping[str, Band] | None, members: int) -> dict[str, Band]:
    """The default bands with the given ones in place of those of the same names.

    Raises:
        ValueError: a measure that does not exist.
    """
    for name in given or {}:
        if name not in BANDS:
            hint = nearest(name, BANDS)
            raise ValueError(f"HackingMonitor bands names '{name}'; the measures are {', '.join(BANDS)}.{hint}")
    bands = BANDS | dict(given or {})
    if members == 1:
        bands.pop("diversity")  # one image a prompt has none
    return bands


def _points(change: float) -> str:
    return f"{'rose' if change >= 0 else 'fell'} by {abs(change):.2f} points"
