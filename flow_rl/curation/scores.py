"""Raw scores of every prompt's group as one file, and the parts it is put together from.

One safetensors file: ids (P,), prompt hashes (P,), scores (P, G, K), and in its header who scored what.

Shapes: P prompts, G images a prompt, K rewards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flow_rl.batches import PromptTable
from flow_rl.curation.provenance import Provenance, prompt_digests
from flow_rl.files import replacing_file

FORMAT = "curated-scores-1"


@dataclass(frozen=True, kw_only=True)
class CuratedScores:
    """Raw scores of G images a prompt.

    Attributes:
        ids: of the prompts, int64 (P,).
        prompts: hash of what each prompt asks for, int64 (P,), see `prompt_digests`.
        categories: of each prompt, length P.
        reward_names: in the order of the scores' last dimension, length K.
        scores: on the scale 1..5, NaN where a reward could not score, float32 (P, G, K).
        provenance: what they were made with.
    """

    ids: Tensor
    prompts: Tensor
    categories: tuple[str, ...]
    reward_names: tuple[str, ...]
    scores: Tensor
    provenance: Provenance

    def __post_init__(self) -> None:
        p = len(self.ids)
        assert self.prompts.shape == (p,), self.prompts.shape
        assert len(self.categories) == p, len(self.categories)
        assert self.scores.ndim == 3, self.scores.shape
        assert self.scores.shape[0] == p, self.scores.shape
        assert self.scores.shape[2] == len(self.reward_names), self.scores.shape

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Sequence[int]) -> CuratedScores:
        """The prompts at `index`, in that order."""
        at = torch.tensor(index, dtype=torch.int64)
        return replace(
            self,
            ids=self.ids[at],
            prompts=self.prompts[at],
            categories=tuple(self.categories[i] for i in index),
            scores=self.scores[at],
        )

    def rewards(self, names: Sequence[str]) -> CuratedScores:
        """The scores of these rewards alone, in this order."""
        columns = [self.reward_names.index(name) for name in names]
        return replace(self, reward_names=tuple(names), scores=self.scores[:, :, columns])

    def align(self, table: PromptTable) -> CuratedScores:
        """The rows of a table's prompts, in its order, with the categories that the table has now.

        Raises:
            ValueError: prompts without scores, or whose text or source image is another one.
        """
        place = {identifier: row for row, identifier in enumerate(self.ids.tolist())}
        missing = [i for i in table.ids if i not in place]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(table)} prompts have no curated scores (for example id {missing[0]}). Run "
                "`train.py curate` with this prompt file: it samples what is missing."
            )
        found = self.rows([place[i] for i in table.ids])
        changed = (found.prompts != prompt_digests(table)).nonzero().flatten().tolist()
        if changed:
            raise ValueError(
                f"{len(changed)} prompts are not those that were scored (for example id {table.ids[changed[0]]}): the "
                "text or source image of an id has changed. Curate anew, or give changed prompts new ids."
            )
        return replace(found, categories=tuple(table.categories))

    # ----------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write atomically: a reader sees the whole file or none."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # one entry: several would be written in any order, and equal scores should make equal files
        header = {"categories": self.categories, "rewards": self.reward_names, "provenance": asdict(self.provenance)}
        tensors = {"ids": self.ids, "prompts": self.prompts, "scores": self.scores.float().contiguous()}
        with replacing_file(path) as partial:
            save_file(tensors, partial, metadata={FORMAT: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> CuratedScores:
        """Read a file.

        Raises:
            ValueError: no file, or none that `save` wrote.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"No curated scores at '{path}'. Make them with `train.py curate --curation.scores={path}`."
            )
        try:
            with safe_open(path, framework="pt") as file:
                held = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except SafetensorError as error:
            raise ValueError(f"'{path}' is no file of curated scores: {error}.") from None
        if FORMAT not in held:
            raise ValueError(f"'{path}' is no file of curated scores: expected '{FORMAT}' in its header.")
        header = json.loads(held[FORMAT])
        return cls(
            **tensors,
            categories=tuple(header["categories"]),
            reward_names=tuple(header["rewards"]),
            provenance=Provenance(**header["provenance"]),
        )


def merged(parts: Sequence[CuratedScores]) -> CuratedScores:
    """All rows of the parts, each prompt once, sorted by id: the order in which they were made leaves no trace."""
    ids = torch.cat([part.ids for part in parts])
    both = replace(
        parts[0],
        ids=ids,
        prompts=torch.cat([part.prompts for part in parts]),
        categories=tuple(c for part in parts for c in part.categories),
        scores=torch.cat([part.scores for part in parts]),
    )
    first = {identifier: row for row, identifier in reversed(list(enumerate(ids.tolist())))}
    return both.rows([first[identifier] for identifier in sorted(first)])
