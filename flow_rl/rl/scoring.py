"""Several rewards on one batch: raw scores.

Shapes: N samples, K rewards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flow_rl.batches import Prompts
from flow_rl.distributed.shares import Share, raised_everywhere
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.asking import ask


def samples_of(prompts: Prompts, images: Tensor) -> Samples:
    """What rewards are shown of images (N, 3, H, W), one a prompt."""
    return Samples(images=images, prompts=prompts.texts, categories=prompts.categories, sources=prompts.sources)


def score_all(rewards: Mapping[str, Reward], samples: Samples, section: str = "model.rewards") -> Tensor:
    """Raw scores (N, K) in the rewards' order, NaN where one could not score a sample.

    Args:
        rewards: by name, K of them.
        samples: N of them.
        section: of the config that names the rewards, for messages.

    Raises:
        RunStopped: see `flow_rl.rewards.asking.ask`.
    """
    columns = [ask(reward, samples, name, section=section) for name, reward in rewards.items()]
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(samples), 0)


def score_safely(rewards: Mapping[str, Reward], samples: Samples, section: str = "model.monitors") -> Tensor:
    """What `score_all` gives, for rewards that are only watched: where one raises, it warns, and the scores are NaN."""
    columns = []
    for name, reward in rewards.items():
        try:
            columns.append(ask(reward, samples, name, section=section))
        except Exception as error:  # whatever it is, monitoring must not end a run
            warnings.warn(f"Reward '{name}' is for monitoring only, its scores are NaN: {error}", stacklevel=2)
            columns.append(torch.full((len(samples),), torch.nan))
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(samples), 0)


def score_share(
    share: Share,
    scorers: Mapping[str, Reward],
    prompts: Prompts,
    images: Tensor,
    *,
    score: Callable[[Mapping[str, Reward], Samples], Tensor] = score_all,
) -> Tensor:
    """Score the images of all ranks, each image once and on the rank that drew it. Every rank must ask.

    Args:
        share: of this rank, r rows.
        scorers: by name, K of them, the same on every rank.
        prompts: of this rank's rows, length r.
        images: this rank's, M a prompt, shape (r M, 3, H, W).
        score: `score_all` or `score_safely`.

    Returns:
        Raw scores of all rows in their order, the same on every rank, on the CPU, shape (R M, K).

    Raises:
        Exception: what a scorer raised; on ranks without an error of their own, what `raised_everywhere` does.
    """
    members = len(images) // len(prompts)
    scores = torch.full((len(images), len(scorers)), torch.nan)
    if not scorers:
        return torch.zeros(share.total * members, 0)
    with raised_everywhere():
        if share.own:
            repeated = prompts.select(list(range(share.own))).repeat_interleave(members)
            scores[: len(repeated)] = score(scorers, samples_of(repeated, images[: len(repeated)]))
    return share.gather(scores)
