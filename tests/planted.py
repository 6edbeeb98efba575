"""Rewards with a known answer."""

from __future__ import annotations

import torch
from torch import Tensor

from flow_rl.rewards import Reward, Samples


class Brightness(Reward):
    """1 for black, 5 for white."""

    def score(self, samples: Samples) -> Tensor:
        return 1 + 4 * samples.images.float().mean(dim=(1, 2, 3))


class Dark(Reward):
    """The opposite of `Brightness`, masked where the prompt asks for hair."""

    def score(self, samples: Samples) -> Tensor:
        scores = 6 - Brightness().score(samples)
        return torch.where(torch.tensor(["hair" in p for p in samples.prompts]), torch.nan, scores)


class Erratic(Reward):
    """Anything in 1..5: the images of a prompt lie far apart."""

    def score(self, samples: Samples) -> Tensor:
        return 1 + 4 * (samples.images.double().mean(dim=(1, 2, 3)) * 1e4).frac().float()


class Broken(Reward):
    """A constant; NaN where the prompt asks for it, out of range where that is asked for."""

    def score(self, samples: Samples) -> Tensor:
        scores = torch.full((len(samples),), 3.0)
        for i, prompt in enumerate(samples.prompts):
            if "nan" in prompt:
                scores[i] = float("nan")
            if "seven" in prompt:
                scores[i] = 7.0
        return scores
