"""The rows of the report's tables: which weights, drawn how."""

from __future__ import annotations

from dataclasses import dataclass

from flow_rl.batches import TASKS

BASE_ROW = "base"
#: the base as its users would draw from it: what the recipe should beat
GUIDED_BASE = "base_guided"
MIX_RL, STUDENT = "mix_rl", "student"
#: by task; the teachers roll out, are tested and are imitated at the same guidance
TEACHERS = {"t2i": "t2i_teacher", "edit": "edit_teacher"}
#: ends the name of a teacher that the annotator's verifiers reward: the upper bound
VERIFIER = "_verifier"
#: ends the name of a row that is drawn at guidance 1, of a model that was trained under guidance
AT_ONE = "_unguided"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tested model.

    Attributes:
        name: as the tables show it.
        model: whose weights.
        guided: drawn at the guidance of the rollouts, or at 1.
        tasks: that it is tested on.
    """

    name: str
    model: str
    guided: bool
    tasks: tuple[str, ...] = TASKS


def rows_of(*, whole: bool, upper_bound: bool) -> tuple[Row, ...]:
    """What is tested, in the order of the tables: the base first, and last what the run is about.

    Args:
        whole: the whole recipe, or a verifier-rewarded text-to-image teacher alone.
        upper_bound: also the verifier-rewarded teachers.
    """
    base = (
        Row(name=BASE_ROW, model=BASE_ROW, guided=False),
        Row(name=GUIDED_BASE, model=BASE_ROW, guided=True),
    )
    verifier = tuple(
        Row(name=f"{teacher}{VERIFIER}", model=f"{teacher}{VERIFIER}", guided=True, tasks=(task,))
        for task, teacher in TEACHERS.items()
    )
    if not whole:
        return (*base, verifier[0])
    teachers = []
    for task, teacher in TEACHERS.items():
        teachers.append(Row(name=teacher, model=teacher, guided=True))
        teachers.append(Row(name=f"{teacher}{AT_ONE}", model=teacher, guided=False, tasks=(task,)))
    mixed = (
        Row(name=MIX_RL, model=MIX_RL, guided=True),
        Row(name=f"{MIX_RL}{AT_ONE}", model=MIX_RL, guided=False),
    )
    student = Row(name=STUDENT, model=STUDENT, guided=False)
    return (*base, *teachers, *(verifier if upper_bound else ()), *mixed, student)
