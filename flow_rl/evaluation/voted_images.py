"""The images that people voted on: each vote is checked against what its voter saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flow_rl.evaluation.vote_files import Vote, image_path, read_index, read_rows
from flow_rl.evaluation.vote_outcomes import Tally
from flow_rl.suggestions import nearest


class VotedImages:
    """The images of all models that were voted on.

    Args:
        models: name and directory of each, as `callbacks.ImageWriter` leaves it.
        edits: edit file, whose source images the voters saw; None for text-to-image.

    Raises:
        ValueError: one name or directory for two models, or a file that cannot be read; see `read_index`.
    """

    def __init__(self, models: Sequence[tuple[str, Path]], edits: Path | None = None) -> None:
        self._directories: dict[str, Path] = {}
        for name, directory in models:
            if name in self._directories:
                raise ValueError(f"Two models are called '{name}': give names, such as --left base=DIR.")
            for other, known in self._directories.items():
                if known.resolve() == directory.resolve():
                    raise ValueError(f"'{other}' and '{name}' are both the images in '{directory}'.")
            self._directories[name] = directory
        self._rows = {name: read_index(directory) for name, directory in self._directories.items()}
        self._edits: dict[int, dict[str, Any]] | None = None
        if edits is not None:
            fields = {"id": int, "instruction": str, "source": str}
            found = read_rows(edits, fields)
            self._edits = {r["id"]: r | {"where": where, "path": edits.parent / r["source"]} for where, r in found}

    def check(self, vote: Vote) -> None:
        """Refuse a vote whose images are not those that the voter saw.

        Raises:
            ValueError: an unknown model, an image that is missing or outside of its directory, another prompt, or an
                edit without its source.
        """
        for name in (vote.first, vote.second):
            row = self._row(name, vote)
            if row["prompt"] != vote.text:
                raise ValueError(
                    f"{vote.where}: the voter read '{vote.text}', but {row['where']} has the prompt '{row['prompt']}'. "
                    f"The images of '{name}' are of other prompts."
                )
            task = row.get("task")  # an index may lack it
            if task is not None and (task == "edit") != (self._edits is not None):
                told = "give their sources with --edits" if task == "edit" else "leave --edits out"
                raise ValueError(f"{vote.where}: the images are of task '{task}' ({row['where']}): {told}.")
            self._image(name, vote)
        self.source(vote)

    def _row(self, name: str, vote: Vote) -> dict[str, Any]:
        if name not in self._rows:
            raise ValueError(
                f"{vote.where}: unknown model '{name}'; known are {', '.join(self._rows)}.{nearest(name, self._rows)} "
                "Name its images with --left, --right or --model."
            )
        if vote.key not in self._rows[name]:
            index = self._directories[name] / "index.jsonl"
            raise ValueError(f"{vote.where}: '{index}' has no image of prompt {vote.key[0]}, member {vote.key[1]}.")
        return self._rows[name][vote.key]

    def _image(self, name: str, vote: Vote) -> Path:
        row = self._row(name, vote)
        try:
            path = image_path(self._directories[name], row)
        except ValueError as error:
            raise ValueError(f"{vote.where}: {error}") from None
        if not path.is_file():
            raise ValueError(f"{vote.where}: no image '{path}', which {row['where']} names.")
        return path

    def image(self, name: str, tally: Tally) -> Path:
        """The image of a model in a pair whose votes were checked."""
        return self._image(name, tally.votes[0])

    def source(self, vote: Vote) -> Path | None:
        """The source image that a vote's edits start from; None for text-to-image.

        Raises:
            ValueError: the edit file lacks the edit, has another instruction, or its source is missing.
        """
        if self._edits is None:
            return None
        edit = self._edits.get(vote.key[0])
        if edit is None:
            raise ValueError(f"{vote.where}: the edit file has no edit with id {vote.key[0]}.")
        if edit["instruction"] != vote.text:
            raise ValueError(
                f"{vote.where}: the voter read '{vote.text}', but {edit['where']} has the instruction "
                f"'{edit['instruction']}'."
            )
        if not edit["path"].is_file():
            raise ValueError(f"{vote.where}: no source image '{edit['path']}', which {edit['where']} names.")
        return Path(edit["path"]).resolve()
