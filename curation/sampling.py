"""Rolling out groups of the base and scoring them: as a part of a run, or as one of its own on any number of ranks.

Shapes: P prompts, G images a prompt, K rewards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from typing_extensions import override

from curation.parts import PartFiles
from curation.provenance import Provenance
from datamodules.batches import Prompts, PromptTable
from datamodules.prompts import PromptDataModule
from lightning_modules import GRPOPolicy
from lightning_modules.sampling import group_rollout
from lightning_modules.scoring import samples_of, score_all
from lightning_modules.windows import steps_of_iteration
from rewards import Reward
from strategies.sharding import gather, release

#: the noise of curation is that of an iteration before the first: training never sees these images again
CURATION_STEP = -1


def task_rewards(policy: GRPOPolicy, task: str) -> dict[str, Reward]:
    """The rewards that are asked about a task's samples."""
    return {name: policy.rewards[name] for name in policy.reward_weights[task]}


def provenance_of(policy: GRPOPolicy, task: str, members: int) -> Provenance:
    """What scores of this policy's base are made with."""
    return Provenance.of(
        model_path=policy.model_path,
        image_size=policy.image_size,
        rewards=task_rewards(policy, task),
        rollout=policy.rollout_settings,
        seed=policy.seed,
        members=members,
    )


@torch.no_grad()
def score_groups(policy: GRPOPolicy, prompts: Prompts, members: int) -> Tensor:
    """Roll out `members` images a prompt by the rollout's own settings and score them.

    The noise is keyed by (seed, prompt id, member): neither the batch nor the rank changes an image but by rounding.

    Returns:
        raw scores of every reward of the task, NaN where masked, float32 (P, G, K).
    """
    settings = policy.rollout_settings
    steps: tuple[int, ...] = ()
    if policy.objective.uses_window:
        steps = steps_of_iteration(settings.window, settings.num_steps, iteration=0, seed=policy.seed)
    training = policy.model.transformer.training
    policy.model.transformer.eval()
    scores = []
    for part in prompts.parts(max(1, settings.batch_size // members)):
        trajectory = group_rollout(
            policy.model,
            policy.sampler,
            part,
            policy.sampler.encode(policy.model, part.texts, part.sources),
            group_size=members,
            step=CURATION_STEP,
            transition=settings.transition,
            noise_level=settings.noise_level,
            stochastic_steps=steps,
            shared_noise=settings.shared_noise,
        )
        repeated = part.repeat_interleave(members)
        samples = samples_of(repeated, policy.model.decode(trajectory.latents))
        scores.append(score_all(task_rewards(policy, prompts.task), samples).view(len(part), members, -1))
    policy.model.transformer.train(training)
    return torch.cat(scores)


class PendingBatches(IterableDataset):
    """This rank's share of the batches without scores, each read when it is due.

    Args:
        table: all prompts.
        batches: rows of the table, the same on every rank.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, table: PromptTable, batches: list[list[int]], rank: int, world_size: int) -> None:
        self.table, self.batches = table, batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Prompts]:
        return map(self.table.select, self.batches)


class CurationRun(LightningModule):
    """Samples what has no scores yet, as Lightning's `predict`, which brings devices, ranks and the progress bar.

    Args:
        policy: whose base, rollout and rewards are used.
        data: whose training prompts are scored.
        path: of the file of scores.
        members: G; None for the rollout's own group size.
        batch_size: prompts a batch, the unit that is kept and that ranks share.
    """

    def __init__(
        self, policy: GRPOPolicy, data: PromptDataModule, path: str, *, members: int | None = None, batch_size: int
    ) -> None:
        super().__init__()
        self.policy, self.task, self.table, self.path = policy, data.task, data.train, path
        self.members = members or policy.rollout_settings.group_size
        self.batch_size = batch_size
        self.parts: PartFiles | None = None

    def is_complete(self) -> bool:
        """Tell whether the file has scores of every prompt, made with what this run has: then no model need load.

        Raises:
            ValueError: scores made with something else.
        """
        if not Path(self.path).is_file():
            return False
        return not self._files(provenance_of(self.policy, self.task, self.members)).pending(self.batch_size)

    def _files(self, provenance: Provenance) -> PartFiles:
        return PartFiles(self.path, provenance, self.table)

    @override
    def configure_model(self) -> None:
        self.policy.configure_model()

    @override
    def predict_dataloader(self) -> DataLoader:
        """Agree on what is to be done: one rank looks, since another may write before it has looked."""
        found: dict[str, Any] = {}
        if self.trainer.global_rank == 0:
            try:
                self.parts = self._files(provenance_of(self.policy, self.task, self.members))
                found = {"provenance": self.parts.provenance, "batches": self.parts.pending(self.batch_size)}
            except ValueError as error:  # every rank must hear of it, or the others would wait
                found = {"error": str(error)}
        found = self.trainer.strategy.broadcast(found)
        if "error" in found:
            raise ValueError(found["error"])
        self.parts = self.parts or self._files(found["provenance"])
        share = PendingBatches(self.table, found["batches"], self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(share, batch_size=None)

    @override
    def transfer_batch_to_device(self, batch: Prompts, device: torch.device, dataloader_idx: int) -> Prompts:
        return batch.to(device)

    @override
    def predict_step(self, batch: Prompts, batch_idx: int) -> None:
        scores = score_groups(self.policy, batch, self.members)
        self.parts.write(batch.ids, list(task_rewards(self.policy, self.task)), scores)

    @override
    def on_predict_start(self) -> None:
        gather(self.policy.model)  # text encoder included: ranks have different numbers of batches, and of forwards

    @override
    def on_predict_end(self) -> None:
        release(self.policy.model)
        self.trainer.strategy.barrier("curation")
        if self.trainer.global_rank == 0:
            self.parts.finish()


def sample_in_place(
    trainer: Trainer, policy: GRPOPolicy, data: PromptDataModule, path: str, *, batch_size: int
) -> None:
    """Make the scores inside a run that is about to train, before its first batch: every rank takes its share."""
    run = CurationRun(policy, data, path, batch_size=batch_size)
    run.trainer = trainer
    batches = run.predict_dataloader().dataset
    run.on_predict_start()
    for batch in tqdm(batches, desc="curation", unit="batch", disable=trainer.global_rank != 0):
        run.predict_step(batch.to(policy.device), 0)
    run.on_predict_end()
