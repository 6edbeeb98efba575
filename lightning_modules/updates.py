"""From rollouts and advantages to an optimizer step.

Shapes: N samples, K trained steps a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from flow_rl.distributed.devices import to_device
from flow_rl.distributed.sharding import gathered
from flow_rl.rl.objectives import Objective, Rollout, micro_batches
from flow_rl.rl.reward_metrics import combined
from flow_rl.rl.settings import ObjectiveSettings
from flow_rl.rl.shadow_weights import AdapterOff, ShadowWeights
from lightning_modules.base import TransformerTraining


class PolicyUpdates(TransformerTraining):
    """Updates of a policy by one `Objective`.

    A subclass sets everything below.
    """

    objective: Objective
    objective_settings: ObjectiveSettings
    #: the old policy and the one before training, where the objective uses them
    old: ShadowWeights | None
    reference: ShadowWeights | AdapterOff | None

    def old_weights(self) -> AbstractContextManager[None]:
        """Inside, the model computes with the old policy's weights, if there is one."""
        return nullcontext() if self.old is None else self.old.applied()

    def prepare(self, rollout: Rollout, update: int) -> dict[str, Tensor]:
        """What the old policy and the reference give for an update, from 0; see `Objective.prepare`."""
        with self.old_weights(), gathered(self.model.transformer):
            prepared = self.objective.prepare(self.model, rollout, update)
        if self.reference is not None:
            with self.reference.applied(), gathered(self.model.transformer):
                prepared |= self.objective.prepare_reference(self.model, rollout, prepared)
        return prepared

    def accumulate_gradients(
        self, rollout: Rollout, advantages: Tensor, prepared: dict[str, Tensor], *, pairs: int | None = None
    ) -> dict[str, Tensor]:
        """Backward micro-batch by micro-batch.

        Args:
            rollout: N samples.
            advantages: one a sample, shape (N,).
            prepared: see `Objective.prepare`.
            pairs: (sample, step) pairs of the whole update, of which this rollout is a piece; None: it is all of it.

        Returns:
            metrics of the rollout; its loss is its share of the update's.
        """
        samples, steps = len(rollout.conditioning), self.objective.steps_a_sample(rollout)
        advantages = to_device(advantages, rollout.device)
        collected: list[tuple[int, dict[str, Tensor]]] = []
        for some in micro_batches(samples, steps, self.objective_settings.micro_batch_size, rollout.device):
            loss, metrics = self.objective.loss(
                self.model, rollout, advantages, some, prepared, denominator=pairs or samples * steps
            )
            self.manual_backward(loss)
            collected.append((len(some), {"loss": loss.detach()} | metrics))
        return combined(collected)

    def update_once(
        self, rollouts: Sequence[Rollout], advantages: Iterable[Tensor], prepared: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """One optimizer step over all rollouts, left out where it would not be finite.

        Advantages are taken one rollout after another, each when its turn comes.
        """
        self.optimizers().zero_grad()
        sizes = [len(rollout.conditioning) * self.objective.steps_a_sample(rollout) for rollout in rollouts]
        with gathered(self.model.transformer):
            found = [
                self.accumulate_gradients(rollout, ours, ready, pairs=sum(sizes))
                for rollout, ours, ready in zip(rollouts, advantages, prepared, strict=True)
            ]
        metrics = combined(list(zip(sizes, found, strict=True)))
        metrics["gradient_norm"] = self.finish_update(metrics["loss"], max_skipped=self.objective_settings.max_skipped)
        return metrics
