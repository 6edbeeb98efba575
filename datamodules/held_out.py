"""What keeps held-out data apart from training data: files and rows that are in both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datamodules.faults import DataError
from flow_rl.messages import warn_on_first_rank

_ADVICE = "Scores on prompts that are trained on say nothing of others: name a file of held-out rows."


@dataclass(frozen=True, kw_only=True)
class Split:
    """A data file as it was read.

    Attributes:
        setting: that names it.
        path: of the file.
        content: hash of its bytes.
        lines: line of each row by id.
        keys: line of each row by what makes two rows the same task, whatever their ids.
        texts: what the generator reads of each row, by id.
    """

    setting: str
    path: str
    content: str
    lines: Mapping[object, int]
    keys: Mapping[tuple[str, ...], int]
    texts: Mapping[object, str]


def content_of(path: str | Path) -> str:
    """Hash of a file's bytes, 16 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def check_held_out(train: Split, held: Split) -> None:
    """Refuse a held-out file that repeats the training file or rows of it, and warn of texts that are in both.

    Raises:
        DataError: the same file, a copy of it, or nothing but rows of it.
    """
    names = f"{held.setting} '{held.path}'", f"{train.setting} '{train.path}'"
    if train.content == held.content:
        raise DataError([f"{names[0]} is the same file as {names[1]}, or a copy of it. {_ADVICE}"])
    both = [key for key in held.keys if key in train.keys]
    if not both:
        return
    first = both[0]
    what = (
        f"{len(both)} of the {len(held.keys)} prompts of {names[0]} are in {names[1]} as well (for example line "
        f"{held.keys[first]}, which is line {train.keys[first]} there)"
    )
    same_ids = all(train.texts.get(name) == text for name, text in held.texts.items())
    if same_ids and len(both) == len(held.keys):
        raise DataError([f"{what}, with the same ids. {_ADVICE}"])
    warn_on_first_rank(f"{what}. {_ADVICE}")
