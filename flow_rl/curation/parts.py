"""The file of scores while it grows: one small file a batch, so that a kill loses nothing but the batch under way.

Shapes: P prompts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flow_rl.batches import PromptTable
from flow_rl.curation.provenance import Provenance, prompt_digests
from flow_rl.curation.scores import CuratedScores, merged


class PartFiles:
    """Batches of scores beside the final file, in `<file>.parts/`, and how they become it.

    Args:
        path: of the final file.
        provenance: of this run; parts and files of another one are refused.
        table: all prompts.
    """

    def __init__(self, path: str | Path, provenance: Provenance, table: PromptTable) -> None:
        self.path = Path(path)
        self.table = table
        self.directory = self.path.with_name(self.path.name + ".parts")
        self.provenance = provenance

    def read(self) -> list[CuratedScores]:
        """What there is: the final file, if any, then the parts.

        Raises:
            ValueError: scores that were made with something else.
        """
        files = [self.path] if self.path.is_file() else []
        files += sorted(self.directory.glob("*.safetensors"))
        found = [CuratedScores.load(file) for file in files]
        for file, part in zip(files, found, strict=True):
            differences = part.provenance.differences(self.provenance, same_draws=True)
            if differences:
                raise ValueError(
                    f"'{file}' has scores that were made with something else: {'; '.join(differences)}. Give "
                    f"--curation.scores another name, or delete '{self.path}' and '{self.directory}'."
                )
        return found

    @cached_property
    def _digests(self) -> dict[int, int]:
        return dict(zip(self.table.ids, prompt_digests(self.table).tolist(), strict=True))

    def pending(self, batch_size: int) -> list[list[int]]:
        """Rows of the table that have no scores yet, in batches of at most `batch_size` prompts.

        The batches are cut from the whole table, so that a resumed run forms those of an uninterrupted one: its
        scores are the same to the last bit.
        """
        known = {key for part in self.read() for key in zip(part.ids.tolist(), part.prompts.tolist(), strict=True)}
        wanted = list(self._digests.items())
        batches = [range(start, min(start + batch_size, len(wanted))) for start in range(0, len(wanted), batch_size)]
        left = [[row for row in batch if wanted[row] not in known] for batch in batches]
        return [batch for batch in left if batch]

    def write(self, ids: Sequence[int], reward_names: Sequence[str], scores: Tensor) -> None:
        """Keep the scores (P, G, K) of a batch, whose prompts are named by their ids."""
        rows = [self.table.ids.index(identifier) for identifier in ids]
        batch = self.table.subset(rows)
        part = CuratedScores(
            ids=torch.tensor(batch.ids),
            prompts=prompt_digests(batch),
            categories=tuple(batch.categories),
            reward_names=tuple(reward_names),
            scores=scores.float().cpu(),
            provenance=self.provenance,
        )
        part.save(self.directory / f"{ids[0]}-{len(ids)}.safetensors")

    def finish(self) -> None:
        """Put the final file together, without the scores of prompts that have changed since, and remove the parts."""
        current = []
        for part in self.read():
            pairs = enumerate(zip(part.ids.tolist(), part.prompts.tolist(), strict=True))
            current.append(part.rows([row for row, (i, hashed) in pairs if self._digests.get(i, hashed) == hashed]))
        merged(current).save(self.path)
        shutil.rmtree(self.directory, ignore_errors=True)
