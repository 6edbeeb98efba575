"""Rolling out groups of the base and scoring them: as a part of a run, or as one of its own on any number of ranks.

Ranks take turns at the batches, so a batch, and with it every bit of its scores, is the same on any number of ranks.
What FSDP2 gathers, all ranks gather together: each encodes as often as the others and gathers the transformer once a
turn, even where it has fewer prompts left, or none.

Shapes: P prompts, G images a prompt, K rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from typing_extensions import override

from datamodules.prompts import PromptDataModule
from flow_rl.batches import Prompts, PromptTable
from flow_rl.curation.parts import PartFiles
from flow_rl.curation.provenance import Provenance
from flow_rl.distributed.sharding import gathered
from flow_rl.distributed.shares import raised_everywhere
from flow_rl.rewards import Reward
from flow_rl.rl.sampling import group_rollout
from flow_rl.rl.scoring import samples_of, score_all
from lightning_modules import GRPOPolicy

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
def score_groups(
    policy: GRPOPolicy, prompts: Prompts, members: int, *, batch_size: int | None = None, own: bool = True
) -> Tensor:
    """Roll out `members` images a prompt by the rollout's own settings and score them.

    The noise is keyed by (seed, prompt id, member): neither the batch nor the rank changes an image but by rounding.

    Args:
        policy: with its model configured.
        prompts: of this rank.
        members: G.
        batch_size: prompts of the longest batch of all ranks; None is this one's length.
        own: false on a rank that is out of batches: it only takes part in what the ranks do together.

    Returns:
        Raw scores of every reward of the task, NaN where masked, float32 (P, G, K); all NaN if the prompts are not own.

    Raises:
        Exception: what a reward raised; on ranks without an error of their own, what `raised_everywhere` does.
    """
    settings, model, device = policy.rollout_settings, policy.model, policy.compute_device
    steps = policy.objective.stochastic_steps(settings, iteration=0, seed=policy.seed)
    training = model.transformer.training
    model.transformer.eval()
    prompts = prompts.to(device)
    chunks = policy.sampler.encode_chunks(model, prompts, members=members)
    for _ in range(policy.sampler.count_chunks(batch_size or 0, members=members) - len(chunks)):
        policy.sampler.encode(model, prompts.texts[:1], None if prompts.sources is None else prompts.sources[:1])
    with gathered(model.transformer):
        latents = [
            group_rollout(
                model,
                policy.sampler,
                chunk.prompts,
                chunk.branches,
                settings,
                group_size=members,
                step=CURATION_STEP,
                stochastic_steps=steps,
            ).latents
            for chunk in (chunks if own else ())
        ]
    model.transformer.train(training)
    rewards = task_rewards(policy, prompts.task)
    scores = torch.full((len(prompts) * members, len(rewards)), torch.nan)
    with raised_everywhere():
        if own:
            images = policy.sampler.decode(model, torch.cat(latents), members=members).to(device)
            scores = score_all(rewards, samples_of(prompts.repeat_interleave(members), images))
    return scores.view(len(prompts), members, -1)


class PendingBatches(IterableDataset):
    """This rank's turns: batches without scores, each read when it is due, and whether the batch is the rank's own.

    Every rank has as many turns as the others. On a rank that is out of batches the last turn has another rank's.

    Args:
        table: all prompts.
        batches: rows of the table, the same on every rank.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, table: PromptTable, batches: list[list[int]], rank: int, world_size: int) -> None:
        self.table, self.batches, self.rank, self.world_size = table, batches, rank, world_size

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.world_size)

    def __iter__(self) -> Iterator[tuple[Prompts, bool]]:
        for number in range(self.rank, len(self) * self.world_size, self.world_size):
            own = number < len(self.batches)
            yield self.table.select(self.batches[number if own else -1]), own


class CurationRun(LightningModule):
    """Samples what has no scores yet, as Lightning's `predict`, which brings devices, ranks and the progress bar.

    Args:
        policy: whose base, rollout and rewards are used.
        data: whose training prompts are scored.
        path: of the file of scores.
        members: G; None for the rollout's own group size.
        batch_size: prompts a batch, the unit that is kept and at which ranks take turns.
    """

    def __init__(
        self, policy: GRPOPolicy, data: PromptDataModule, path: str, *, members: int | None = None, batch_size: int
    ) -> None:
        super().__init__()
        self.policy, self.task, self.table, self.path = policy, data.task, data.train, path
        self.members = members or policy.rollout_settings.group_size
        self.batch_size = batch_size
        self.parts: PartFiles | None = None
        #: prompts of the longest batch of any rank
        self.longest = 0

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
        self.longest = max(map(len, found["batches"]), default=0)
        turns = PendingBatches(self.table, found["batches"], self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(turns, batch_size=None)

    @override
    def transfer_batch_to_device(
        self, batch: tuple[Prompts, bool], device: torch.device, dataloader_idx: int
    ) -> tuple[Prompts, bool]:
        return batch  # moved where it is scored; Lightning's own transfer refuses frozen dataclasses

    @override
    def predict_step(self, batch: tuple[Prompts, bool], batch_idx: int) -> None:
        prompts, own = batch
        scores = score_groups(self.policy, prompts, self.members, batch_size=self.longest, own=own)
        if own:
            self.parts.write(prompts.ids, list(task_rewards(self.policy, self.task)), scores)

    @override
    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier("curation")
        if self.trainer.global_rank == 0:
            self.parts.finish()


def sample_in_place(
    trainer: Trainer, policy: GRPOPolicy, data: PromptDataModule, path: str, *, batch_size: int
) -> None:
    """Make the scores inside a run that is about to train, before its first batch."""
    run = CurationRun(policy, data, path, batch_size=batch_size)
    run.trainer = trainer
    batches = run.predict_dataloader().dataset
    for batch in tqdm(batches, desc="curation", unit="batch", disable=trainer.global_rank != 0):
        run.predict_step(batch, 0)
    run.on_predict_end()
