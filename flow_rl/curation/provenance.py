"""What curated scores were made with: they say nothing of another model, reward, prompt or way of rolling out.

Shapes: P prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flow_rl.batches import PromptTable
from flow_rl.models.loading import config_directory
from flow_rl.rewards import Reward
from flow_rl.rewards.fingerprints import digest, digest_directory
from flow_rl.rl.settings import RolloutSettings


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Content hashes of what the scores of a base depend on.

    Attributes:
        model: hash of the base's directory.
        rewards: hash of each reward, by name.
        rollout: settings that shape the images, by dotted name.
        sampling: seed and images a prompt. Scores of another seed are other draws of the same: they serve training as
            well, but are never mixed in one file.
    """

    model: str
    rewards: Mapping[str, str]
    rollout: Mapping[str, Any]
    sampling: Mapping[str, int]

    @classmethod
    def of(
        cls,
        *,
        model_path: str,
        image_size: int,
        rewards: Mapping[str, Reward],
        rollout: RolloutSettings,
        seed: int,
        members: int,
    ) -> Provenance:
        """Read the files and hash them; takes as long as reading the model does."""
        return cls(
            model=digest_directory(config_directory(model_path)),
            rewards={name: reward.fingerprint() for name, reward in rewards.items()},
            # as a file would give them back, so that both compare
            rollout=json.loads(json.dumps({"image_size": image_size} | _image_settings(rollout), default=str)),
            sampling={"seed": seed, "members": members},
        )

    def differences(self, now: Provenance, *, same_draws: bool) -> list[str]:
        """What is not as it was when the scores were made, in words.

        Args:
            now: of the run that wants to use the scores; it may have fewer rewards.
            same_draws: whether seed and images a prompt must agree, too.
        """
        found = [] if self.model == now.model else [f"the model's files (hash {self.model} then, {now.model} now)"]
        for name, hashed in now.rewards.items():
            if name not in self.rewards:
                found.append(f"reward '{name}' (there are scores of {', '.join(self.rewards)})")
            elif self.rewards[name] != hashed:
                found.append(f"reward '{name}' (hash {self.rewards[name]} then, {hashed} now)")
        records = [("model.rollout.", self.rollout, now.rollout)]
        if same_draws:
            records.append(("", self.sampling, now.sampling))
            found += [f"reward '{name}', which is gone" for name in self.rewards if name not in now.rewards]
        for prefix, then, present in records:
            found += [
                f"{prefix}{name} ({then.get(name)} then, {present.get(name)} now)"
                for name in sorted(then.keys() | present.keys())
                if then.get(name) != present.get(name)
            ]
        return found


def prompt_digests(table: PromptTable) -> Tensor:
    """A hash of what each prompt asks for: its text and, for edits, its source image. Categories do not count.

    Returns:
        int64 (P,), in the table's order.
    """
    assert dataclasses.is_dataclass(table), f"{type(table).__name__} is no dataclass"
    length, rows, common = len(table), [], {}
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if field.name == "categories" or value is None:
            continue
        if isinstance(value, (tuple, Tensor)) and len(value) == length:
            rows.append((field.name, value))
        else:
            common[field.name] = value
    hashes = [digest([common, *((name, values[i]) for name, values in rows)]) for i in range(length)]
    # 63 of the 64 bits: a tensor's integers have a sign
    return torch.tensor([int(h, 16) >> 1 for h in hashes], dtype=torch.int64)


def _image_settings(rollout: RolloutSettings) -> dict[str, Any]:
    """The settings that decide what an image looks like, flat; batch sizes and unused ones are left out."""
    chosen: dict[str, Any] = {
        "num_steps": rollout.num_steps,
        "cfg": rollout.cfg,
        "transition": rollout.transition,
        "shared_noise": rollout.shared_noise,
    }
    chosen |= {f"guidance.{name}": value for name, value in vars(rollout.guidance).items()}
    if rollout.transition != "ode":
        chosen["noise_level"] = rollout.noise_level
        chosen |= {f"window.{name}": value for name, value in vars(rollout.window).items()}
    return chosen
