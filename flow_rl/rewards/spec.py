"""`reward.json`: what an exported reward model is, beside its weights.

It holds the rubrics that the model was trained with, whole and with their hashes, how a score is read, and how far the
scores agreed with held-out human ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rewards.readout import DIRECT_TEMPLATE, SCORE_TEMPLATE
from flow_rl.rewards.rubrics import Rubric
from flow_rl.suggestions import nearest

SPEC_FILE = "reward.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """The content of `reward.json`.

    Attributes:
        rubrics: by dimension.
        reading: how answers are made and read.
        digit_token_ids: ids of "1".."5" in the model's vocabulary, for engines that are not this project's.
        validation: metrics of the last validation by dimension and name; None for one that was not defined.
        base: the model that training started from.
    """

    rubrics: Mapping[str, Rubric]
    reading: ReadingSettings
    digit_token_ids: tuple[int, ...]
    validation: Mapping[str, Mapping[str, float | None]]
    base: str

    def write(self, directory: str | Path) -> None:
        """Write `reward.json` into an export."""
        content = {
            "format": FORMAT,
            "rubrics": {dimension: rubric.to_dict() for dimension, rubric in self.rubrics.items()},
            "readout": {
                "rule": "sum_s s p(s) over the tokens of 1..5 at the position after the template, renormalised",
                "template": SCORE_TEMPLATE,
                "template_without_reasoning": DIRECT_TEMPLATE,
                "digit_token_ids": list(self.digit_token_ids),
                **asdict(self.reading),
            },
            "validation": {dimension: dict(metrics) for dimension, metrics in self.validation.items()},
            "base": self.base,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        (Path(directory) / SPEC_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: str | Path) -> RewardSpec:
        """The spec of an export.

        Raises:
            ValueError: no such directory, no reward.json, one of another format, or a rubric whose text is not the one
                that its hash was taken of.
        """
        path = Path(directory) / SPEC_FILE
        if not path.is_file():
            raise ValueError(
                f"'{directory}' has no {SPEC_FILE}, so it is no reward model that this project exported. Train one "
                "with lightning_modules.RewardFinetune and the ExportModel callback."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}', line {error.lineno}: not JSON ({error.msg}).") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"'{path}' is not of format {FORMAT}: export the reward model anew.")
        try:
            return cls._from(content, path)
        except (KeyError, TypeError) as error:
            raise ValueError(f"'{path}' is incomplete or damaged ({error!r}): export the reward model anew.") from None

    @classmethod
    def _from(cls, content: dict[str, Any], path: Path) -> RewardSpec:
        rubrics = {}
        for dimension, values in content["rubrics"].items():
            stated = values.pop("hash")
            rubric = Rubric.from_dict(values, where=f"'{path}', rubric '{dimension}'")
            if rubric.hash != stated:
                raise ValueError(
                    f"'{path}': the rubric '{dimension}' was changed after the export: its text has the hash "
                    f"{rubric.hash}, the file states {stated}."
                )
            rubrics[dimension] = rubric
        readout = content["readout"]
        return cls(
            rubrics=rubrics,
            reading=ReadingSettings(**{f.name: readout[f.name] for f in fields(ReadingSettings)}),
            digit_token_ids=tuple(readout["digit_token_ids"]),
            validation=content["validation"],
            base=content["base"],
        )

    def rubric(self, dimension: str, *, expected: Rubric | None, path: str | Path) -> Rubric:
        """The rubric of a dimension, refused where it is not the expected one.

        Args:
            dimension: one that the model was trained for.
            expected: what the caller wants to judge by; None takes the model's own.
            path: of the export, for messages.

        Raises:
            ValueError: a dimension that the model does not know, or a rubric whose hash differs.
        """
        if dimension not in self.rubrics:
            hint = nearest(dimension, self.rubrics)
            raise ValueError(
                f"The reward model '{path}' was trained for {', '.join(self.rubrics)}, not for '{dimension}'.{hint}"
            )
        known = self.rubrics[dimension]
        if expected is not None and expected.hash != known.hash:
            raise ValueError(
                f"The reward model '{path}' was trained with the rubric '{known.name}' version {known.version}, hash "
                f"{known.hash}; asked for is version {expected.version}, hash {expected.hash}. Its scores mean nothing "
                "under another text: leave the rubric out to use the model's own, or train anew."
            )
        return known
