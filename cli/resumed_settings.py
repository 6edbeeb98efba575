"""Resuming under other settings than a checkpoint was trained with: one table says what is refused.

`docs/resuming.md` is this table for readers; a test compares both.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from cli.settings_record import CONTENT, FINGERPRINT, KEY, Record
from flow_rl.errors import SettingError

#: stands for a setting that one of both records does not have
ABSENT = "not set"
#: characters of a value that a message quotes
_QUOTED = 100


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens where settings differ.

    Attributes:
        settings: patterns of names (`*` stands for anything, dots as well).
        refused: whether the run ends; otherwise the difference is named in the log.
        why: one clause: what a refused setting would do, or why another may change.
        of: the rule holds for modules of this class, or where this is so; None: for all.
    """

    settings: tuple[str, ...]
    refused: bool
    why: str
    of: str | None = None


def _refused(*settings: str, why: str, of: str | None = None) -> Rule:
    return Rule(settings=settings, refused=True, why=why, of=of)


def _allowed(*settings: str, why: str, of: str | None = None) -> Rule:
    return Rule(settings=settings, refused=False, why=why, of=of)


#: callbacks that decide what is trained or exported, by class
TRAINING_CALLBACKS = ("WeightEMA", "RewardRangeFilter", "CategoryWeightCalibration")
_OF_TRAINING = " or ".join(TRAINING_CALLBACKS)
_WITH_SCHEDULE = "a run with model.lr_scheduler"
_SCHEDULED = "the schedule resumes from its own state, so the new value would be ignored"
_VALIDATION = "is for validation and test alone"
_MEMORY = "bounds memory; the sums are the same but for rounding"
_FORMAT = "the model would compute in another number format"
#: the first rule that fits decides
RULES: tuple[Rule, ...] = (
    _refused("run.seed", "seed_everything", "model.seed", "data*.seed", why="noise and data would be another run's"),
    _refused("run.tf32", "trainer.precision", "trainer.strategy.precision", "model.frozen_dtype", why=_FORMAT),
    _refused("model.dtype", "model.quantization", why=_FORMAT),
    _allowed("run.*", why="says where the run writes and how many threads compute"),
    _refused("callbacks.*", "trainer.callbacks.*", why="it decides what is trained or exported", of=_OF_TRAINING),
    _allowed("callbacks.*", "trainer.callbacks.*", why="watches or writes"),
    _refused("trainer.accumulate_grad_batches", why="a step would be of another batch"),
    _allowed("trainer.*", why="says where and how long the run trains, and what it shows"),
    _allowed("data*.validation*", "data*.max_validation", "data*.eval_batch_size", why=_VALIDATION),
    _allowed("data*.test_*", "data*.max_test", why=_VALIDATION),
    _refused("data.*", why="the run would train on other data, or in another order"),
    _allowed("model.judges*", "model.monitors*", "model.test_members", "model.reading*", why=_VALIDATION),
    _allowed("model.guidance", "model.val_guidances", "model.scored*", why=_VALIDATION),
    _allowed("model.rewards*", why=_VALIDATION, of="DistillationStudent"),
    _allowed("model.max_prompt_tokens", "model.max_skipped", "model.max_silent", why="says when the run stops"),
    _allowed("model.check_rewards", why="says what is looked at before training"),
    _allowed("model.gradient_clip", why="limits the step, like the learning rate"),
    _allowed("model.gradient_checkpointing", "model.compile_blocks", "model.shard_teachers", why=_MEMORY),
    _allowed("model.*micro_batch_size", "model.length_parts", why=_MEMORY),
    _allowed("model.rollout.batch_size", "model.distillation.batch_size", why=_MEMORY),
    _refused("model.lr_scheduler*", why=_SCHEDULED),
    _refused("model.optimizer", "model.optimizer.amsgrad", why="the optimizer's state would not fit"),
    _refused("model.optimizer.*", why=_SCHEDULED, of=_WITH_SCHEDULE),
    _allowed("model.optimizer.*", why="is applied from the next step on"),
    _refused(f"{FINGERPRINT}*", why="what the run is rewarded for would be something else"),
    _refused("model*", why="the run would train something else"),
)  # fmt: skip
#: sections whose keys are names of the user's, so that one more is a difference and no setting of a newer version
_NAMED = (
    "model.rewards",
    "model.reward_weights",
    "model.teachers",
    "model.rubrics",
    "model.judges",
    "model.monitors",
    "callbacks",
    "trainer.callbacks",
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting that is not what it was.

    Attributes:
        setting: its name, or that of a section which is there once alone or has another class.
        before: its value in the checkpoint.
        now: its value in this run.
        rule: what happens.
    """

    setting: str
    before: Any
    now: Any
    rule: Rule

    def __str__(self) -> str:
        return f"{self.setting} was {_shown(self.before)} and is {_shown(self.now)}"


def compare_with_checkpoint(path: Path, now: Record, *, module: type) -> None:
    """Log what a run resumes under that its checkpoint does not record, or records otherwise.

    Args:
        path: of the checkpoint.
        now: the settings of this run.
        module: class of what is trained.

    Raises:
        SettingError: a difference is refused; all of them are named.
    """
    from strategies.checkpoint_reading import read_description  # it knows the generators' libraries

    before = read_description(path).get(KEY)
    if before is None:
        rank_zero_warn(f"'{path}' does not record the settings of its run, so they can't be compared with these.")
    elif changes := check_resumed(before, now, str(path), module=module):
        rank_zero_info(changes)


def check_resumed(before: Record, now: Record, path: str, *, module: type) -> str | None:
    """Refuse to resume under settings that would train something else.

    Args:
        before: of the checkpoint, see `record_of`.
        now: of this run.
        path: of the checkpoint, for the message.
        module: class that is trained.

    Returns:
        A message that names what differs and may; None where nothing does.

    Raises:
        SettingError: naming everything that differs and may not.
    """
    found = differences(before, now, module=module)
    refused = [f"{difference}: {difference.rule.why}." for difference in found if difference.rule.refused]
    allowed = [str(difference) for difference in found if not difference.rule.refused]
    if refused:
        listed = "".join(f"\n  {number}. {text}" for number, text in enumerate(refused, 1))
        raise SettingError(
            f"'{path}' was trained under other settings, and resuming from it would mix two runs:{listed}\n"
            "Set them back to resume. To train on under the new ones, start a new run from the export of the old one: "
            "leave out --ckpt_path and set --model.model_path to the export (docs/resuming.md)."
        )
    return f"Resuming '{path}' under settings that have changed: {'; '.join(allowed)}." if allowed else None


def differences(before: Record, now: Record, *, module: type) -> list[Difference]:
    """All settings that differ, each section once where it is there once alone or has another class.

    Args:
        before: of the checkpoint.
        now: of this run.
        module: class that is trained.
    """
    changed = [name for name in dict.fromkeys([*before, *now]) if not _equal(before.get(name), now.get(name))]
    kinds = {kind.__name__ for kind in module.__mro__} | _circumstances(before, now)
    # Settings of a reward change its scores if its fingerprint says so.
    intact = [n for n in now if n.startswith(FINGERPRINT) and before.get(n) == now[n]]
    same_scores = [f"model.rewards.{name.removeprefix(FINGERPRINT)}" for name in intact]
    found: dict[str, Difference] = {}
    for name in changed:
        head = _head(before, now, name)
        values = _value(before, head), _value(now, head)
        rule = _rule({name, head}, kinds | _kind_of_callback(name, before, now))
        if _inside(head, same_scores):
            rule = _allowed(head, why="gives the same scores")
        elif rule.refused and values[0] == ABSENT and not _inside(head, _NAMED) and not head.startswith(FINGERPRINT):
            rule = _allowed(head, why="the checkpoint does not know it")
        if head not in found or (rule.refused and not found[head].rule.refused):
            found[head] = Difference(setting=head, before=values[0], now=values[1], rule=rule)
    return _without_derived(list(found.values()))


def _rule(names: Collection[str], kinds: Collection[str]) -> Rule:
    for rule in RULES:
        fits = any(fnmatchcase(name, pattern) for name in names for pattern in rule.settings)
        if fits and (rule.of is None or rule.of in kinds):
            return rule
    return _allowed(*names, why="is no setting of what is trained")


def _circumstances(before: Record, now: Record) -> set[str]:
    """What a rule's `of` may name beside a module's class."""
    place = "model.lr_scheduler"
    scheduled = [_value(record, place) not in (None, ABSENT) for record in (before, now)]
    return {_WITH_SCHEDULE} if any(scheduled) else set()


def _kind_of_callback(name: str, before: Record, now: Record) -> set[str]:
    listed = name.startswith("trainer.callbacks.")
    if not listed and not name.startswith("callbacks."):
        return set()
    place = ".".join(name.split(".")[: 3 if listed else 2])
    classes = {str(_value(record, place)).rpartition(".")[2] for record in (before, now)}
    return {_OF_TRAINING} if classes & set(TRAINING_CALLBACKS) else set()


def _head(before: Record, now: Record, name: str) -> str:
    """The outermost section around a setting that only one record has, or that has two classes."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        place = ".".join(parts[:count])
        if place in _NAMED:
            continue
        classes = before.get(f"{place}.class_path"), now.get(f"{place}.class_path")
        alone = ABSENT in (_value(before, place), _value(now, place))
        if alone or place in before or place in now or classes[0] != classes[1]:
            return place
    return name


def _value(record: Record, place: str) -> Any:
    """A leaf, the class of a section, or the section."""
    if place in record:
        return record[place]
    inside = {key.removeprefix(f"{place}."): value for key, value in record.items() if key.startswith(f"{place}.")}
    return inside.get("class_path", inside or ABSENT)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping) and CONTENT in one and CONTENT in other:
        return bool(one[CONTENT] == other[CONTENT])
    return bool(_plain(one) == _plain(other))


def _plain(value: Any) -> Any:
    return value["path"] if isinstance(value, Mapping) and CONTENT in value else value


def _inside(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _without_derived(found: Sequence[Difference]) -> list[Difference]:
    """Without what follows from another one: a setting of `run` is the one to change."""
    sources = [d for d in found if d.setting.startswith("run.")]

    def derived(difference: Difference) -> bool:
        if difference.setting.startswith(FINGERPRINT):
            place = f"model.rewards.{difference.setting.removeprefix(FINGERPRINT)}"
            return any(_inside(other.setting, [place]) for other in found)
        pair = difference.before, difference.now
        return difference not in sources and any(
            (source.before, source.now) == pair and source.rule.refused >= difference.rule.refused for source in sources
        )

    return [difference for difference in found if not derived(difference)]


def _shown(value: Any) -> str:
    if value == ABSENT:
        return ABSENT
    if isinstance(value, Mapping) and CONTENT in value:
        return f"'{value['path']}' (content {value[CONTENT]})"
    if isinstance(value, str):
        text = f"'{value}'"
    else:
        text = json.dumps(_paths(value), default=str)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_paths(item) for item in value]
    if isinstance(value, Mapping) and CONTENT in value:
        return f"{value['path']} ({value[CONTENT]})"
    return value
