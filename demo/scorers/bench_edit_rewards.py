"""What the demo's bench asks of edits, beside identity and the quality score: one facet a reward, for evaluation only.

`docs/evaluation.md` has the definitions in one table, with what each cannot see.

Shapes: N images, C = 3, H = W = 32.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from datamodules.edit_pairs import read_image
from demo.scorers.edit_rewards import understood
from demo.scorers.rewards import to_scale
from demo.scorers.sets import load_verifier
from demo.scorers.weights import VerifierName
from demo.world.vocabulary import ATTRIBUTES
from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Reward, Samples
from flow_rl.rewards.pixels import finite_images, quantise

#: RGB distance up to which a pixel kept its colour; the palettes' colours are 0.3 and more apart
SAME_COLOUR = 0.15


class EditKeptReward(Reward):
    """Share of the other attributes that the verifier reads in the output as it reads them in the source.

    Args:
        verifier: whose eyes.
    """

    def __init__(self, verifier: VerifierName = "judge") -> None:
        self.verifier = load_verifier(verifier)

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the instruction is none of the demo world's or the image is not finite."""
        images, finite = finite_images(samples.images)
        scores = torch.full((len(samples),), torch.nan)
        asked = {row: edit for row, edit in understood(samples).items() if finite[row]}
        if asked:
            rows, categories = list(asked), [samples.categories[row] for row in asked]
            shown = zip(
                self.verifier.predict(samples.sources[rows].cpu().float(), categories),
                self.verifier.predict(images[rows], categories),
                strict=True,
            )
            shares = []
            for (attribute, _), category, (before, after) in zip(asked.values(), categories, shown, strict=True):
                names = [a.name for a in ATTRIBUTES[category] if a.name != attribute]
                shares.append(sum(before[name] == after[name] for name in names) / len(names))
            scores[rows] = to_scale(torch.tensor(shares))
        return scores


class PreservationReward(Reward):
    """Share of the pixels outside of the edit that keep their colour (an RGB distance up to 0.15).

    Which pixels the edit leaves alone is exact: those that source and target renders share.

    Args:
        edit_file: edit file with targets; looked up by source image and instruction.

    Raises:
        ValueError: a file without targets.
    """

    def __init__(self, edit_file: str) -> None:
        path = Path(edit_file)
        if not path.is_file():
            raise ValueError(f"No edit file '{edit_file}': make it with `python -m demo.making.edit_prompts`.")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all("target" in row for row in rows):
            raise ValueError(f"'{edit_file}' has edits without a target: what an edit leaves alone is not known.")
        self._rows, self._directory = rows, path.parent
        self._targets: dict[tuple[bytes, str], Path] = {}

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where the edit is not in the file or the image is not finite."""
        images, finite = finite_images(samples.images)
        scores = torch.full((len(samples),), torch.nan)
        for i, instruction in enumerate(samples.prompts):
            target = self._target(samples.sources[i], instruction) if samples.sources is not None else None
            if target is None or not finite[i]:
                continue
            source = samples.sources[i].cpu().float()
            untouched = (read_image(target, source.shape[-1])[0] - source).abs().amax(dim=0) < 0.5 / 255
            if untouched.any():
                kept = (images[i] - source).square().sum(dim=0).sqrt() <= SAME_COLOUR
                scores[i] = SCORE_MIN + (SCORE_MAX - SCORE_MIN) * kept[untouched].float().mean()
        return scores

    def _target(self, source: Tensor, instruction: str) -> Path | None:
        if not self._targets:  # read when first needed: naming this reward in a config costs nothing
            for row in self._rows:
                pixels = read_image(self._directory / row["source"], source.shape[-1])[0]
                self._targets[_key(pixels, row["instruction"])] = self._directory / row["target"]
        return self._targets.get(_key(source, instruction))


def _key(source: Tensor, instruction: str) -> tuple[bytes, str]:
    return quantise(source[None]).numpy().tobytes(), instruction
