"""Prompts for reinforcement learning, from JSON Lines files `{"id": int, "prompt": str, "category": str}`."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import override

from datamodules.faults import Faults
from datamodules.held_out import Split, check_held_out, content_of
from datamodules.jsonl import Row, read_rows
from datamodules.stream import StreamedDataModule, batch_indices, epoch_order
from flow_rl.batches import PromptData, Prompts, PromptTable
from flow_rl.messages import warn_on_first_rank
from flow_rl.names import same_tag


def read_prompts(path: str) -> Prompts:
    """All prompts of a file.

    Raises:
        DataError: see `read_rows`.
    """
    faults = Faults()
    rows = prompt_rows(path, faults)
    faults.check()
    return prompts_of(rows)


def prompt_rows(path: str, faults: Faults) -> list[Row]:
    """The rows of a prompt file; see `read_prompts`."""
    fields = {"id": int, "prompt": str, "category": str}
    return read_rows(path, fields, texts=("prompt",), names=("category",), faults=faults)


def prompts_of(rows: Sequence[Row]) -> Prompts:
    """A table of rows that were checked."""
    return Prompts(
        ids=tuple(row.record["id"] for row in rows),
        texts=tuple(row.record["prompt"] for row in rows),
        categories=tuple(row.record["category"] for row in rows),
    )


class PromptStream(IterableDataset):
    """An endless stream of prompt batches, the same for any number of ranks: each takes its slice of a batch.

    Args:
        prompts: all of them; with sources on disk, a batch's are read when it is due.
        batch_size: prompts of one iteration, over all ranks.
        seed: of the order.
        start: the first iteration.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, prompts: PromptTable, *, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"data.prompts_per_step is {batch_size}, which {world_size} ranks cannot share evenly: "
                f"make it a multiple of {world_size}."
            )
        self.prompts, self.batch_size, self.seed, self.start = prompts, batch_size, seed, start
        self.rank, self.world_size = rank, world_size
        batch_indices(len(prompts), batch_size, seed=seed, batch=start)  # refuse an impossible size now

    def __iter__(self) -> Iterator[Prompts]:
        share = self.batch_size // self.world_size
        batch = self.start
        while True:
            indices = batch_indices(len(self.prompts), self.batch_size, seed=self.seed, batch=batch)
            yield self.prompts.select(indices[self.rank * share : (self.rank + 1) * share])
            batch += 1


class FixedBatches(Dataset):
    """Prompts in order, a batch at a time, each read when it is due.

    Args:
        prompts: all of them.
        batch_size: prompts a batch.
    """

    def __init__(self, prompts: PromptTable, batch_size: int) -> None:
        self.prompts, self.batch_size = prompts, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.prompts) / self.batch_size)

    def __getitem__(self, index: int) -> Prompts:
        start = index * self.batch_size
        return self.prompts.select(list(range(start, min(start + self.batch_size, len(self.prompts)))))


class TaskDataModule(StreamedDataModule, PromptData):
    """A data module of prompts, of one task or made of such of several."""

    @override
    @abstractmethod
    def by_task(self) -> dict[str, PromptDataModule]:
        """The data of each task."""


class PromptDataModule(TaskDataModule):
    """Prompt files for `fit`, `validate`, `test` and `predict`.

    A run may be restricted to some of the training prompts. Its checkpoints remember which, and a run that goes on from
    one must be restricted alike: the order of the data depends on it.

    Args:
        train_file: prompts to train on.
        validation_file: fixed prompts that are sampled with fixed noise as training goes on.
        test_file: held-out prompts for `test` and `predict`.
        prompts_per_step: prompts of one iteration, over all ranks.
        eval_batch_size: prompts sampled at a time in `validate`, `test` and `predict`, over all ranks.
        max_train: use at most so many training prompts, always the same; None for all.
        max_validation: the same for validation prompts.
        max_test: the same for test prompts.
        seed: of the order of training prompts.
    """

    #: what the prompts ask for
    task = "t2i"
    #: of source images; prompts alone have none
    image_size: int | None = None
    #: hash of the ids that training is restricted to; empty for all
    restriction = ""
    _expected: str | None = None
    _handed_out = False

    def __init__(
        self,
        train_file: str,
        validation_file: str,
        test_file: str,
        prompts_per_step: int = 8,
        eval_batch_size: int = 64,
        max_train: int | None = None,
        max_validation: int | None = None,
        max_test: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if prompts_per_step < 1 or eval_batch_size < 1:
            raise ValueError(
                f"data.prompts_per_step ({prompts_per_step}) and data.eval_batch_size ({eval_batch_size}) must be at "
                "least 1."
            )
        self.prompts_per_step = prompts_per_step
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        # Read here rather than in `setup`: a bad file must end the run before a model loads.
        faults = Faults()
        self.splits: dict[str, Split] = {}
        for name, path in (("train", train_file), ("validation", validation_file), ("test", test_file)):
            with faults.collect():
                rows = self.rows(path, faults)
                self.splits[name] = Split(
                    setting=f"data.{name}_file",
                    path=path,
                    content=content_of(path),
                    lines={row.record["id"]: row.line for row in rows},
                    keys={self.key_of(row, path): row.line for row in rows},
                    texts={row.record["id"]: self.text_of(row) for row in rows},
                )
                setattr(self, name, self.table(rows, path))
        faults.check()
        self.train = _some(self.train, max_train, "max_train")
        self.validation = _some(self.validation, max_validation, "max_validation")
        self.test = _some(self.test, max_test, "max_test")
        if prompts_per_step > len(self.train):
            raise ValueError(
                f"data.prompts_per_step is {prompts_per_step}, but '{train_file}' has {len(self.train)} prompts"
                f"{'' if max_train is None else ' (data.max_train)'}: a step takes no prompt twice."
            )
        shared = set(self.train.ids) & set(self.test.ids)
        if shared:
            raise ValueError(
                f"'{train_file}' and '{test_file}' share {len(shared)} ids (for example {min(shared)}): ids key the "
                "noise and tell held-out prompts apart, so they must differ."
            )
        for first, second in same_tag(
            c for table in (self.train, self.validation, self.test) for c in table.categories
        ):
            warn_on_first_rank(
                f"The categories '{first}' and '{second}' differ in case or form alone, and are reported and weighted "
                "apart. Write both alike if they are one."
            )
        for name in ("validation", "test"):
            check_held_out(self.splits["train"], self.splits[name])

    train: PromptTable
    validation: PromptTable
    test: PromptTable

    def rows(self, path: str, faults: Faults) -> list[Row]:
        """The rows of a file that are right; what is wrong with the others goes to `faults`."""
        return prompt_rows(path, faults)

    def table(self, rows: Sequence[Row], path: str) -> PromptTable:
        """The prompts of rows."""
        return prompts_of(rows)

    def text_of(self, row: Row) -> str:
        """What the generator reads of a row."""
        return row.record["prompt"]

    def key_of(self, row: Row, path: str) -> tuple[str, ...]:
        """What makes two rows the same task, whatever their ids."""
        return (" ".join(self.text_of(row).casefold().split()),)

    @override
    def by_task(self) -> dict[str, PromptDataModule]:
        """The data of each task: here of one."""
        return {self.task: self}

    def restrict(self, ids: Collection[int]) -> None:
        """Train on these prompts alone. To be called before the training data are asked for.

        Args:
            ids: of the prompts to keep, in any order; the others of the file are left out.

        Raises:
            ValueError: an id that the file does not have, or fewer prompts than a step takes.
            RuntimeError: the training data have been handed out already.
        """
        if self._handed_out:
            raise RuntimeError("The training prompts were restricted after the training data were made: too late.")
        unknown = set(ids) - set(self.train.ids)
        if unknown:
            raise ValueError(f"{len(unknown)} of the prompts to keep are not in the training file: {min(unknown)}, ...")
        if len(set(ids)) < self.prompts_per_step:
            raise ValueError(
                f"{len(set(ids))} training prompts are kept, and data.prompts_per_step is {self.prompts_per_step}: a "
                "step takes no prompt twice. Keep more, or lower it."
            )
        kept = set(ids)
        self.train = self.train.subset([row for row, i in enumerate(self.train.ids) if i in kept])
        self.restriction = hashlib.sha256(" ".join(map(str, sorted(kept))).encode()).hexdigest()[:16]

    @override
    def order(self) -> dict[str, str | int]:
        return {
            "the content of data.train_file": self.splits["train"].content,
            "the number of training prompts": len(self.train),
            "data.prompts_per_step": self.prompts_per_step,
            "data.seed": self.seed,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"restriction": self.restriction}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.expect(state_dict.get("restriction", ""))

    def expect(self, restriction: str) -> None:
        """Refuse to hand out training data of another restriction than this one, which a checkpoint remembers."""
        self._expected = restriction

    @override
    def teardown(self, stage: str) -> None:
        self._handed_out = False

    def stream(self, *, start: int, rank: int, world_size: int) -> PromptStream:
        """The endless stream of training batches from iteration `start` on, as one of the ranks sees it.

        Raises:
            ValueError: a checkpoint was read that was trained on other prompts.
        """
        if self._expected not in (None, self.restriction):
            raise ValueError(
                "The checkpoint was trained on another choice of prompts "
                f"({self._expected or 'all of them'}, now {self.restriction or 'all of them'}), so the run would not "
                "go on with the next batch. Resume with the same filter, threshold and scores, or start anew."
            )
        self._handed_out = True
        return PromptStream(
            self.train,
            batch_size=self.prompts_per_step,
            seed=self.seed,
            start=start,
            rank=rank,
            world_size=world_size,
        )

    def fixed(self, split: Literal["validation", "test"]) -> FixedBatches:
        """The prompts of a split, in order."""
        return FixedBatches(getattr(self, split), self.eval_batch_size)

    @override
    def train_dataloader(self) -> DataLoader:
        return whole_batches(self.stream(start=self.position, rank=self.rank, world_size=self.world_size))

    @override
    def val_dataloader(self) -> DataLoader:
        return whole_batches(self.fixed("validation"))

    @override
    def test_dataloader(self) -> DataLoader:
        return whole_batches(self.fixed("test"))

    @override
    def predict_dataloader(self) -> DataLoader:
        return whole_batches(self.fixed("test"))


def whole_batches(batches: Dataset) -> DataLoader:
    """A loader of what are batches already, in their own order."""
    return DataLoader(batches, batch_size=None, shuffle=None if isinstance(batches, IterableDataset) else False)


def _some(prompts: PromptTable, most: int | None, name: str) -> PromptTable:
    """At most `most` prompts: always the same random ones, whatever order the file's categories come in."""
    if most is None or most >= len(prompts):
        return prompts
    if most < 1:
        raise ValueError(f"data.{name} is {most}; it must be at least 1, or null for all.")
    return prompts.subset(sorted(epoch_order(len(prompts), seed=0, epoch=0)[:most]))


def data_by_task(data: LightningDataModule | None) -> dict[str, PromptDataModule]:
    """The prompt data of each task of a run.

    Raises:
        ValueError: data that have no prompts to choose from.
    """
    if not isinstance(data, TaskDataModule):
        raise ValueError(
            f"Prompts are chosen and weighed by category, so the data must be a PromptDataModule or one made of them; "
            f"received {type(data).__name__}."
        )
    return data.by_task()
