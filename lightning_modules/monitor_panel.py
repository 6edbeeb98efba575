"""A few fixed prompts and noises that are drawn again and again as training goes on, and all that is measured there.

Shapes: P prompts, M images a prompt, N = P M samples, K rewards, J monitors, U fixed latents of S tokens and C
channels, L noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from datamodules.batches import Prompts
from datamodules.prompts import FixedBatches
from evaluation.drift import by_prompt, group_diversity, image_measures, latent_rms, relative_distance
from flow.noise import Stream
from flow.schedule import noise_latents
from lightning_modules.grpo_policy import GRPOPolicy
from lightning_modules.iteration import Iteration
from lightning_modules.scoring import samples_of, score_safely
from rewards import Reward
from strategies.sharding import gathered

#: noise levels at which the unconditional branch is compared with that of the base
DRIFT_SIGMAS = (0.9, 0.6, 0.3)
#: fixed latents at each of them
DRIFT_LATENTS = 4
# Velocities are kept for the whole run: of a large image an even sample of the entries is enough.
_KEPT_ENTRIES = 4096


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one look at the panel found.

    Attributes:
        iteration: iterations done before it.
        proxy: raw training rewards, float32 (N, K); NaN where masked.
        panel: raw scores of the monitors, float32 (N, J); NaN where one could not score.
        measures: brightness, saturation, contrast, sharpness, diversity and latent_rms by prompt, each float32 (P,).
        unconditional_drift: relative distance of the unconditional velocity from that of the base, float32 (U,).
        statistics: what the scorers say of this scoring, as `proxy/scorer/name` or `panel/scorer/name`.
    """

    iteration: int
    proxy: Tensor
    panel: Tensor
    measures: Mapping[str, Tensor]
    unconditional_drift: Tensor
    statistics: Mapping[str, float]


class MonitorPanel:
    """Draws and measures the panel of one policy. Its images are those that `validate` draws of the same prompts.

    Args:
        policy: with its model configured.
        prompts: the panel's, a batch a task.
        members: M, images a prompt.
    """

    def __init__(self, policy: GRPOPolicy, prompts: Sequence[Prompts], members: int) -> None:
        self.policy = policy
        self.prompts = tuple(prompts)
        self.members = members
        self._latents: Tensor | None = None
        self._velocities: Tensor | None = None

    def __len__(self) -> int:
        return sum(len(part) for part in self.prompts) * self.members

    @property
    def ids(self) -> list[int]:
        """Of the panel's prompts."""
        return [identifier for part in self.prompts for identifier in part.ids]

    def weights(self) -> Tensor:
        """Today's weights of the rewards in the proxy, (N, K)."""
        samples = [part.repeat_interleave(self.members) for part in self.prompts]
        categories = [category for part in samples for category in part.categories]
        tasks = [part.task for part in samples for _ in range(len(part))]
        return self.policy.weight_source.weights(categories, tasks, list(self.policy.rewards))

    @torch.no_grad()
    def look(self, *, score: bool = True) -> Look:
        """Draw and measure the panel with today's weights. The first look fixes what later ones are compared with.

        Args:
            score: whether to ask rewards and monitors; without, their scores are NaN. With several ranks all draw (it
                may take all of them to evaluate the model) and one asks.
        """
        policy, model = self.policy, self.policy.model
        training = model.transformer.training
        model.transformer.eval()
        with gathered(model):  # and given up again: training goes on with the shards as they are then
            drawn = [policy.sampler.draw(model, part, members=self.members) for part in self.prompts]
            images, latents = [list(column) for column in zip(*drawn, strict=True)]
            if self._latents is None:
                self._latents = latents[0][:: self.members][:DRIFT_LATENTS].float().cpu()
                self._velocities = self._unconditional()
            drift = self._drift()
        model.transformer.train(training)
        asked = [[name for name in policy.rewards if policy.asks(name, part.task)] for part in self.prompts]
        proxy = self._scores(policy.rewards, images, asked if score else [[]] * len(images))
        panel = self._scores(policy.monitors, images, [list(policy.monitors) if score else []] * len(images))
        return Look(
            iteration=policy.iteration,
            proxy=proxy,
            panel=panel,
            measures=self._measures(images, latents),
            unconditional_drift=drift,
            statistics=_statistics(proxy=policy.rewards, panel=policy.monitors),
        )

    def rollout_measures(self, iteration: Iteration) -> dict[str, float]:
        """Means of the monitors' scores and of the image measures over the rollouts of an iteration, by name.

        What the monitors say of that scoring is among them.
        """
        found: list[dict[str, Tensor]] = []
        for part, images in zip(iteration.prompts, iteration.images, strict=True):
            members = len(images) // len(part)
            scores = score_safely(self.policy.monitors, samples_of(part.repeat_interleave(members), images))
            values = {f"panel/{name}": scores[:, k] for k, name in enumerate(self.policy.monitors)}
            values |= image_measures(images.float()) | {"diversity": group_diversity(images.float(), members)}
            found.append({name: value.cpu() for name, value in values.items()})
        means = {name: float(torch.cat([part[name] for part in found]).nanmean()) for name in found[0]}
        return means | _statistics(panel=self.policy.monitors)

    def _scores(
        self, scorers: Mapping[str, Reward], images: Sequence[Tensor], asked: Sequence[Sequence[str]]
    ) -> Tensor:
        """Raw scores (N, scorers) on the CPU; NaN where a scorer is not among those asked about a part."""
        scores = []
        for part, drawn, names in zip(self.prompts, images, asked, strict=True):
            samples = samples_of(part.repeat_interleave(self.members), drawn)
            found = dict(zip(names, score_safely({n: scorers[n] for n in names}, samples).unbind(1), strict=True))
            missing = torch.full((len(drawn),), torch.nan)
            scores.append(torch.stack([found.get(name, missing) for name in scorers], dim=1))
        return torch.cat(scores)

    def _measures(self, images: Sequence[Tensor], latents: Sequence[Tensor]) -> dict[str, Tensor]:
        found: list[dict[str, Tensor]] = []
        for drawn, final in zip(images, latents, strict=True):
            samples = image_measures(drawn.float()) | {"latent_rms": latent_rms(final.float())}
            prompts = {name: by_prompt(values, self.members) for name, values in samples.items()}
            found.append(prompts | {"diversity": group_diversity(drawn.float(), self.members)})
        return {name: torch.cat([part[name].cpu() for part in found]) for name in found[0]}

    def _unconditional(self) -> Tensor:
        """Velocities of the blank prompt at the fixed latents, (U, L, entries that are kept)."""
        policy, model, part = self.policy, self.policy.model, self.prompts[0]
        count = len(self._latents)
        part = part.select(list(range(count)))
        device = next(model.transformer.parameters()).device
        clean = self._latents.to(device)
        # One member beyond those of the panel: noise that no image of it started from.
        noise = policy.sampler.initial_noise(
            model, step=0, ids=part.ids, members=[self.members] * count, stream=Stream.EVALUATION
        )
        blank = model.encode([""] * count, part.sources, size=policy.sampler.size)
        velocities = [
            model.velocity(noise_latents(clean, noise, sigma), sigma, blank).float().flatten(1).cpu()
            for sigma in DRIFT_SIGMAS
        ]
        stride = max(1, velocities[0].shape[1] // _KEPT_ENTRIES)
        return torch.stack([v[:, ::stride] for v in velocities], dim=1)

    def _drift(self) -> Tensor:
        now, base = self._unconditional(), self._velocities
        distances = relative_distance(now.flatten(0, 1), base.flatten(0, 1))
        return distances.unflatten(0, base.shape[:2]).mean(dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """What the first look fixed."""
        return {"latents": self._latents, "velocities": self._velocities}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what the first look of the run fixed."""
        self._latents, self._velocities = state["latents"], state["velocities"]


def _statistics(**scorers: Mapping[str, Reward]) -> dict[str, float]:
    """What scorers say of their scoring since they were last asked, as `kind/scorer/name`.

    Asking also empties their counts: the panel's must not enter those of the next training iteration.
    """
    return {
        f"{kind}/{name}/{key}": value
        for kind, group in scorers.items()
        for name, scorer in group.items()
        for key, value in scorer.statistics().items()
    }


def panel_prompts(loader: DataLoader, count: int) -> tuple[Prompts, ...]:
    """About `count` prompts of the validation data, evenly spaced, a batch a task.

    Args:
        loader: of the data module: over `datamodules.prompts.FixedBatches`, or several of them, one a task.
        count: prompts in all, shared by the tasks.

    Raises:
        ValueError: fewer than two prompts a task, or data that are no prompts.
    """
    datasets = loader.dataset.datasets if isinstance(loader.dataset, ConcatDataset) else [loader.dataset]
    parts = []
    for dataset in datasets:
        if not isinstance(dataset, FixedBatches):
            raise ValueError(
                f"HackingMonitor takes its panel from validation prompts, and {type(dataset).__name__} holds none: "
                "train with datamodules.PromptDataModule or one of its kind."
            )
        size = min(count // len(datasets), len(dataset.prompts))
        if size < 2:
            raise ValueError(
                f"HackingMonitor's panel has {size} prompts of a task: raise its prompts ({count} for "
                f"{len(datasets)} tasks), or add validation data."
            )
        index = torch.linspace(0, len(dataset.prompts) - 1, size).round().long()
        parts.append(dataset.prompts.select(index.tolist()))
    return tuple(parts)
