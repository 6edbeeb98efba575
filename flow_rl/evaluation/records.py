"""What a report is made of: records that check themselves, so that mistakes show before anything is written.

Shapes: H height, W width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flow_rl.batches import TASKS
from flow_rl.evaluation.arena import Rating
from flow_rl.evaluation.curves import Curve
from flow_rl.evaluation.pipeline_picture import Box
from flow_rl.evaluation.statistics import Interval
from flow_rl.suggestions import nearest

VERDICTS = ("holds", "fails", "undecided")
#: whose images a reward model is measured on: before RL, and after
SAMPLED = ("base", "teacher")


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """What every model made of one prompt.

    Attributes:
        prompt: the prompt; for an edit, the instruction.
        images: model name to its image, float in [0, 1], shape (3, H, W), or to a list of them.
        scores: model name to the score of its image(s); NaN or a missing model shows as not scored.
        source: for an edit, the source image, shape (3, H, W).
    """

    prompt: str
    images: Mapping[str, Tensor | Sequence[Tensor]]
    scores: Mapping[str, float] = field(default_factory=dict)
    source: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows of one semantic category."""

    category: str
    rows: Sequence[ComparisonRow]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that should hold, and whether it did.

    Attributes:
        text: what should hold.
        found: the number it rests on, with its interval, as text.
        verdict: `holds`, `fails`, or `undecided` where the interval allows both.
        interval: the same number and its interval; None where there is none.
    """

    text: str
    found: str
    verdict: str
    interval: Interval | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"A claim's verdict is one of {list(VERDICTS)}, received {self.verdict!r}.")


@dataclass(frozen=True, kw_only=True)
class RewardAgreement:
    """How far a reward model's scores agree with the judge's on the images of one model.

    Attributes:
        on: whose images, one of `SAMPLED`.
        srcc: rank correlation, in [-1, 1]; NaN where one side is constant.
        pairwise_in_group: of the pairs of one prompt's images that the judge tells apart, the share that the reward
            model orders alike, in [0, 1]; NaN without such pairs.
        n: images.
    """

    on: str
    srcc: float
    pairwise_in_group: float
    n: int

    def __post_init__(self) -> None:
        if self.on not in SAMPLED:
            raise ValueError(f"A reward model is measured on images of one of {list(SAMPLED)}, received {self.on!r}.")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the hacking monitor saw of one training (docs/monitoring.md).

    Attributes:
        looks: at its panel, the first before training.
        reward_change: of the training reward from the first look to the last, in points of 1..5.
        monitor_change: the same of the scorers that are not trained on.
        gap: by iteration, how far the reward rose beyond the monitors.
        alerts: what the monitor said.
    """

    looks: int
    reward_change: float
    monitor_change: float
    gap: Curve
    alerts: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything `write_report` shows.

    Attributes:
        title: heading, also the title of a print.
        summary: what was done and what came out, paragraph by paragraph.
        models: model names in the order of the tables; the first is the reference that gains are measured
            from.
        bench: task (`t2i`, `edit`) to pillar to model to interval; higher is better in every pillar.
        bench_parts: task to second level or facet to model to interval: what the pillars are made of.
        categories: task to category to model to interval, the overall score split by semantic category.
        gains: task to category to the paired gain of the last model over the first; an entry `overall` is shown
            first and as a headline.
        pipeline: what was made from what, as a picture.
        claims: what should hold, and whether it did.
        curves: learning curves, one chart each.
        grids: before/after comparisons by category.
        arena: task to model to rating; None where no battles were held.
        arena_categories: task to category to model to rating.
        reward_validation: dimension to what is known of its scores on held-out annotations: `srcc`,
            `pairwise_accuracy`, `parse_rate`, `count`; empty where no reward model was trained.
        reward_model: dimension to category, or `all`, to its agreement with the judge where RL used it: on images of
            the base, and of the teacher; empty where no reward model was trained.
        monitoring: training to what the hacking monitor saw of it; empty where none watched.
        seconds: stage to wall-clock seconds, in the order they ran.
        settings: what was run, JSON-serialisable; nested mappings are shown with dotted keys.
        commands: the exact commands that reproduce the report, in order.
        notes: honest limits, one a paragraph.
        score_name: what `gains`, `categories` and the rows' scores measure.
        score_format: format of these scores, and of `bench`, such as `.3f` or `.1%`.
    """

    title: str
    summary: Sequence[str]
    models: Sequence[str]
    bench: Mapping[str, Mapping[str, Mapping[str, Interval]]]
    bench_parts: Mapping[str, Mapping[str, Mapping[str, Interval]]] = field(default_factory=dict)
    categories: Mapping[str, Mapping[str, Mapping[str, Interval]]] = field(default_factory=dict)
    gains: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    pipeline: Sequence[Box] = ()
    claims: Sequence[Claim] = ()
    curves: Sequence[Curve] = ()
    grids: Sequence[Comparison] = ()
    arena: Mapping[str, Mapping[str, Rating]] | None = None
    arena_categories: Mapping[str, Mapping[str, Mapping[str, Rating]]] = field(default_factory=dict)
    reward_validation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reward_model: Mapping[str, Mapping[str, Sequence[RewardAgreement]]] = field(default_factory=dict)
    monitoring: Mapping[str, Watch] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    notes: Sequence[str] = ()
    score_name: str = "judge score"
    score_format: str = ".3f"

    def __post_init__(self) -> None:
        for name in ("summary", "models", "commands", "notes"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a list of strings, received one string: {getattr(self, name)!r}.")
        if not self.models or len(set(self.models)) != len(self.models):
            raise ValueError(f"models must name at least one model, each once; received {list(self.models)}.")
        self._check_names()
        for stage, seconds in self.seconds.items():
            if not math.isfinite(seconds) or seconds < 0:
                raise ValueError(f"Stage {stage!r} took {seconds} seconds; expected a finite number of 0 or more.")
        try:
            format(0.5, self.score_format)
        except ValueError as error:
            raise ValueError(f"score_format {self.score_format!r} cannot format a number; use .3f or .1%.") from error

    def _check_names(self) -> None:
        arena = self.arena or {}
        tasks = [*self.bench, *arena, *self.categories, *self.gains, *self.arena_categories, *self.bench_parts]
        _require_known(tasks, TASKS, "task", "the tasks")
        places = [
            *((f"bench[{task!r}][{pillar!r}]", row) for task in self.bench for pillar, row in self.bench[task].items()),
            *(
                (f"{name}[{task!r}][{category!r}]", row)
                for name in ("bench_parts", "categories", "arena_categories")
                for task, rows in getattr(self, name).items()
                for category, row in rows.items()
            ),
            *((f"arena[{task!r}]", row) for task, row in arena.items()),
            *((f"grids, {row.prompt!r}, images", row.images) for grid in self.grids for row in grid.rows),
            *((f"grids, {row.prompt!r}, scores", row.scores) for grid in self.grids for row in grid.rows),
        ]
        for place, names in places:
            _require_known(names, self.models, f"model in {place}", "models")


def _require_known(names: Iterable[str], known: Sequence[str], what: str, where: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown {what}: {name!r} is not among {where} {list(known)}.{nearest(name, known)}")
