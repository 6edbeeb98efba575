"""A few fixed prompts and noises that are drawn again and again in training, and all that is measured there.

Shapes: P prompts, M images a prompt, N = P M samples, K rewards, J monitors, U fixed latents of S tokens and C
channels, L noise levels; of this rank's share, p prompts and n = p M samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flow_rl import stop_signal
from flow_rl.batches import Prompts
from flow_rl.distributed.gradients import any_rank
from flow_rl.distributed.sharding import gathered
from flow_rl.distributed.shares import Share, gather_objects
from flow_rl.flow.noise import Stream
from flow_rl.flow.schedule import noise_latents
from flow_rl.models import Conditioning
from flow_rl.monitoring.drift import by_prompt, group_diversity, image_measures, latent_rms, relative_distance
from flow_rl.rewards import Reward
from flow_rl.rewards.asking import statistics_of
from flow_rl.rl.iteration import Iteration
from flow_rl.rl.policy import Policy
from flow_rl.rl.sampling import release_encoders
from flow_rl.rl.scoring import samples_of, score_safely, score_share

#: of the config, by the kind of scorer
SECTIONS = {"proxy": "model.rewards", "panel": "model.monitors"}
#: noise levels at which the unconditional branch is compared with that of the base
DRIFT_SIGMAS = (0.9, 0.6, 0.3)
#: fixed latents at each of them
DRIFT_LATENTS = 4
# Velocities are kept for the whole run: of a large image an even sample of the entries is enough.
_KEPT_ENTRIES = 4096


@dataclass(frozen=True, kw_only=True)
class PanelRecord:
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

    The ranks share the panel out: each draws, measures and scores some of the prompts, and all get the whole look.

    Args:
        policy: with its model configured.
        prompts: the panel's, a batch a task, the same on every rank.
        members: M, images a prompt.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Prompts], members: int) -> None:
        self.policy = policy
        self.prompts = tuple(prompts)
        self.members = members
        self._latents: Tensor | None = None
        self._velocities: Tensor | None = None
        self._looked = False

    def __len__(self) -> int:
        return sum(len(part) for part in self.prompts) * self.members

    @property
    def ids(self) -> list[int]:
        """Of the panel's prompts."""
        return [identifier for part in self.prompts for identifier in part.ids]

    def weights(self) -> Tensor:
        """Today's weights of the rewards in the proxy, (N, K)."""
        categories = [category for part in self.prompts for category in part.categories for _ in range(self.members)]
        tasks = [part.task for part in self.prompts for _ in range(len(part) * self.members)]
        return self.policy.weight_source.weights(categories, tasks, list(self.policy.rewards))

    @torch.no_grad()
    def look(self) -> PanelRecord:
        """Draw and measure the panel with today's weights, the same look on every rank; every rank must ask.

        The first look fixes what later ones are compared with.
        """
        policy, model, sampler = self.policy, self.policy.model, self.policy.sampler
        shares = [Share.of(len(part)) for part in self.prompts]
        mine = [
            part.select(list(share.rows)).to(policy.compute_device)
            for part, share in zip(self.prompts, shares, strict=True)
        ]
        training = model.transformer.training
        model.transformer.eval()
        chunks = [sampler.encode_chunks(model, prompts, members=self.members) for prompts in mine]
        blank = self._encode_blank()
        # The transformer alone, and released again: training continues with the shards as they are then.
        with gathered(model.transformer):
            latents = []
            for some in chunks:
                self._give_way()
                latents.append(sampler.denoise(model, some))
            if self._latents is None:
                self._latents = shares[0].gather(latents[0])[:: self.members][:DRIFT_LATENTS].float().clone()
            velocities = self._unconditional(blank)
        model.transformer.train(training)
        if self._velocities is None:
            self._velocities = velocities
        images = [sampler.decode(model, some, members=self.members) for some in latents]
        self._give_way()
        found = [self._examine(*some) for some in zip(shares, mine, images, latents, strict=True)]
        proxy, panel, measures = zip(*found, strict=True)
        self._looked = True
        return PanelRecord(
            iteration=policy.iteration,
            proxy=torch.cat(proxy),
            panel=torch.cat(panel),
            measures={name: torch.cat([part[name] for part in measures]) for name in measures[0]},
            unconditional_drift=self._drift(velocities),
            statistics=_statistics_of_ranks(
                sum(share.own for share in shares), proxy=policy.rewards, panel=policy.monitors
            ),
        )

    def _give_way(self) -> None:
        """Give the first look up where a stop was asked for: nothing has been trained that would be lost."""
        if not self._looked and any_rank(stop_signal.asked()):
            raise stop_signal.StopAsked

    def _examine(
        self, share: Share, prompts: Prompts, images: Tensor, latents: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rewards (N, K), monitors (N, J) and measures (P,) of a part, of whose images this rank has n."""
        policy = self.policy
        images = images.to(policy.compute_device)
        asked = {name: reward for name, reward in policy.rewards.items() if policy.asks(name, prompts.task)}
        scores = score_share(share, asked, prompts, images, score=partial(score_safely, section="model.rewards"))
        found = dict(zip(asked, scores.unbind(1), strict=True))
        missing = torch.full((share.total * self.members,), torch.nan)
        proxy = torch.stack([found.get(name, missing) for name in policy.rewards], dim=1)
        panel = score_share(share, policy.monitors, prompts, images, score=score_safely)
        return proxy, panel, self._measures(share, images, latents)

    def rollout_measures(self, iteration: Iteration) -> dict[str, float]:
        """Means of the monitors' scores and of the image measures over the rollouts of an iteration, by name.

        What the monitors say of that scoring is among them.
        """
        found: list[dict[str, Tensor]] = []
        for part, images in zip(iteration.prompts, iteration.images, strict=True):
            members, device = len(images) // len(part), self.policy.compute_device
            images = images.to(device)
            scores = score_safely(self.policy.monitors, samples_of(part.to(device).repeat_interleave(members), images))
            values = {f"panel/{name}": scores[:, k] for k, name in enumerate(self.policy.monitors)}
            values |= image_measures(images.float()) | {"diversity": group_diversity(images.float(), members)}
            found.append({name: value.cpu() for name, value in values.items()})
        means = {name: float(torch.cat([part[name] for part in found]).nanmean()) for name in found[0]}
        return means | _statistics(panel=self.policy.monitors)

    def _measures(self, share: Share, images: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """What is measured of a part's prompts, by name, each (P,), from the n images and latents of this rank."""
        samples = image_measures(images.float()) | {"latent_rms": latent_rms(latents.float())}
        prompts = {name: by_prompt(values, self.members) for name, values in samples.items()}
        prompts["diversity"] = group_diversity(images.float(), self.members)
        everyone = share.gather(torch.stack(list(prompts.values()), dim=1))
        return {name: everyone[:, column].clone() for column, name in enumerate(prompts)}

    @property
    def _fixed(self) -> Share:
        """The fixed latents, which are those of the first prompts."""
        return Share.of(min(DRIFT_LATENTS, len(self.prompts[0])))

    def _encode_blank(self) -> Conditioning:
        """The blank prompt of this rank's fixed latents; edits keep their sources."""
        policy, rows = self.policy, list(self._fixed.rows)
        sources = self.prompts[0].select(rows).to(policy.compute_device).sources
        blank = policy.model.encode([""] * len(rows), sources, size=policy.sampler.size)
        release_encoders(policy.model)
        return blank

    def _unconditional(self, blank: Conditioning) -> Tensor:
        """Velocities of the blank prompt at the fixed latents, (U, L, entries that are kept)."""
        policy, share, device = self.policy, self._fixed, blank.embeds[0].device
        rows = list(share.rows)
        assert self._latents is not None, "the first look fixes the latents"
        clean = self._latents[rows].to(device)
        # One member beyond those of the panel: noise that no image of it started from.
        noise = policy.sampler.initial_noise(
            policy.model,
            step=0,
            ids=[self.prompts[0].ids[row] for row in rows],
            members=[self.members] * len(rows),
            device=device,
            stream=Stream.EVALUATION,
        )
        velocities = [
            policy.model.velocity(noise_latents(clean, noise, sigma), sigma, blank).float().flatten(1)
            for sigma in DRIFT_SIGMAS
        ]
        stride = max(1, velocities[0].shape[1] // _KEPT_ENTRIES)
        return share.gather(torch.stack([v[:, ::stride] for v in velocities], dim=1))

    def _drift(self, now: Tensor) -> Tensor:
        base = self._velocities
        assert base is not None, "the first look fixes the velocities"
        distances = relative_distance(now.flatten(0, 1), base.flatten(0, 1))
        return distances.unflatten(0, base.shape[:2]).mean(dim=1)

    def state_dict(self) -> dict[str, Tensor | None]:
        """What the first look fixed."""
        return {"latents": self._latents, "velocities": self._velocities}

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        """Restore what the first look of the run fixed."""
        self._latents, self._velocities = state["latents"], state["velocities"]
        self._looked = True


def _statistics(**scorers: Mapping[str, Reward]) -> dict[str, float]:
    """What scorers say of their scoring since they were last asked, as `kind/scorer/name`.

    Asking also empties their counts: the panel's must not enter those of the next training iteration.
    """
    return {
        f"{kind}/{name}/{key}": value
        for kind, group in scorers.items()
        for name, scorer in group.items()
        for key, value in statistics_of(scorer, name, section=SECTIONS[kind]).items()
    }


def _statistics_of_ranks(prompts: int, **scorers: Mapping[str, Reward]) -> dict[str, float]:
    """Means over the ranks of what `_statistics` gives on each, weighted by the prompts whose images it scored."""
    each = gather_objects((prompts, _statistics(**scorers)))
    names = dict.fromkeys(name for _, found in each for name in found)
    means = {}
    for name in names:
        known = [(count, found[name]) for count, found in each if count and name in found]
        total = sum(count for count, _ in known)
        if total:
            means[name] = sum(count * value for count, value in known) / total
    return means
