"""Does an update point uphill where it counts: at the rollout's own guidance?

Under guidance the objective sees another velocity than the sampler, and a policy gradient's credit can turn round
without any sign of it in the loss. So: the reward of fixed prompts and noises at theta and a small step along the
negative gradient.

Shapes: P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flow_rl.batches import Prompts
from flow_rl.distributed.sharding import gathered
from flow_rl.distributed.shares import Share
from flow_rl.rewards.composite import weighted_mean
from flow_rl.rl.policy import Policy
from flow_rl.rl.scoring import score_share

#: half-widths of a 95 % interval, in standard errors
_Z = 1.96


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Weighted rewards of the probe's prompts, on 1..5; NaN where none of a prompt's rewards could score.

    Attributes:
        before: at theta, shape (P,); prompts of a task side by side.
        after: at theta plus `step_size` along the negative gradient, same prompts and noises, shape (P,).
        step_size: length of the step in weight space (Euclidean norm).
    """

    before: Tensor
    after: Tensor
    step_size: float

    @property
    def rise(self) -> float:
        """Points gained along the update; above 0 is uphill."""
        return float((self.after - self.before).nanmean())

    @property
    def slope(self) -> float:
        """Points gained per length of the step."""
        return self.rise / self.step_size

    @property
    def error(self) -> float:
        """Standard error of the rise over prompts; 0 for fewer than two that were scored."""
        rises = (self.after - self.before).double()
        rises = rises[~rises.isnan()]
        return float(rises.std() / math.sqrt(len(rises))) if len(rises) > 1 else 0.0

    @property
    def not_uphill(self) -> bool:
        """Whether the reward does not rise, and chance does not explain it: a 95 % interval that reaches no rise."""
        return self.rise + _Z * self.error <= 0


@contextmanager
def stepped(parameters: Iterable[nn.Parameter], length: float) -> Iterator[bool]:
    """Weights moved along their negative gradient inside the block, and as they were, bit for bit, after it.

    Shards of DTensors are moved where they are. Costs a copy of the weights that have a gradient.

    Args:
        parameters: those without a gradient stay.
        length: of the step, over all parameters together (Euclidean norm).

    Yields:
        whether there is a direction: False, and nothing moved, where the gradient is zero or not finite.
    """
    moving = [(p, p.grad) for p in parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm([gradient for _, gradient in moving])
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if not (math.isfinite(norm) and norm > 0):
        yield False
        return
    kept = [p.detach().clone() for p, _ in moving]
    try:
        with torch.no_grad():
            for parameter, gradient in moving:
                parameter.sub_(gradient, alpha=length / norm)
        yield True
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(moving, kept, strict=True):
                parameter.copy_(value)


def held_out_rewards(module: Policy, held_out: Sequence[Prompts]) -> Tensor:
    """Weighted rewards (P,) of one image a prompt, drawn from its fixed noise at the rollout's guidance.

    Every rank draws and scores its share of the prompts, and all get the same values. Nothing of the training state
    changes: mode and random numbers are as they were. A sharded transformer is gathered once, with the weights of now,
    and released again: a root that stayed whole would continue with them after they have moved.

    Args:
        module: with its model configured.
        held_out: batches, each of one task, P prompts in all, the same on every rank.
    """
    model, sampler, device = module.model, module.sampler, module.compute_device
    mode = model.transformer.training
    model.transformer.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            parts = by_task(held_out)
            shares = [Share.of(len(part)) for part in parts]
            mine = [part.select(list(s.rows)).to(device) for part, s in zip(parts, shares, strict=True)]
            chunks = [sampler.encode_chunks(model, prompts) for prompts in mine]
            with gathered(model.transformer):
                latents = [sampler.denoise(model, some) for some in chunks]
            images = [sampler.decode(model, some).to(device) for some in latents]
    finally:
        model.transformer.train(mode)
    found = []
    for part, share, prompts, drawn in zip(parts, shares, mine, images, strict=True):
        asked = {name: reward for name, reward in module.rewards.items() if module.asks(name, part.task)}
        weights = module.weight_source.weights(part.categories, [part.task] * len(part), list(asked))
        found.append(weighted_mean(score_share(share, asked, prompts, drawn), weights))
    return torch.cat(found)


def by_task(batches: Sequence[Prompts]) -> list[Prompts]:
    """The prompts of all batches as one batch a task: larger ones can be shared out more evenly."""
    found: dict[str, list[Prompts]] = {}
    for batch in batches:
        found.setdefault(batch.task, []).append(batch)
    return [joined(some) for some in found.values()]


def joined(batches: Sequence[Prompts]) -> Prompts:
    """Batches of one task as one."""
    sources = [batch.sources for batch in batches if batch.sources is not None]
    return Prompts(
        ids=tuple(identifier for batch in batches for identifier in batch.ids),
        texts=tuple(text for batch in batches for text in batch.texts),
        categories=tuple(category for batch in batches for category in batch.categories),
        sources=torch.cat(sources) if sources else None,
    )


def probe_gradient(module: Policy, held_out: Sequence[Prompts], *, step_size: float) -> Probe | None:
    """Look which way the gradient that the parameters hold now points. Weights and gradients stay as they are.

    Args:
        module: its trainable parameters have gradients.
        held_out: see `held_out_rewards`.
        step_size: length of the step in weight space (Euclidean norm).

    Returns:
        the probe; None where the gradient is zero or not finite, and so points nowhere.
    """
    with stepped(module.model.transformer.parameters(), step_size) as moved:
        if not moved:
            return None
        after = held_out_rewards(module, held_out)
    return Probe(before=held_out_rewards(module, held_out), after=after, step_size=step_size)


def probe_update(module: Policy, training: Prompts, held_out: Prompts, *, step_size: float) -> Probe | None:
    """Roll out, take the gradient of the first update, and look which way it points, outside any training.

    Args:
        module: with its model configured.
        training: prompts of the update.
        held_out: prompts whose reward is compared.
        step_size: length of the step in weight space (Euclidean norm).

    Returns:
        see `probe_gradient`. Weights are left as they were, gradients at none.
    """
    module.model.transformer.train()
    rollout = module.roll_out(training)
    outcome = module.score(rollout)
    module.zero_grad()
    module.accumulate_gradients(rollout, outcome.advantages, module.prepare(rollout, 0), teaches=outcome.teaches)
    try:
        return probe_gradient(module, [held_out], step_size=step_size)
    finally:
        module.zero_grad()
