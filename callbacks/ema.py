"""An exponential moving average of the trained weights, used for validation and export."""

from __future__ import annotations

import math
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from flow_rl.planning.demands import Average, Demanding, Demands
from flow_rl.rl.shadow_weights import ShadowWeights


class WeightEMA(Callback, Demanding):
    """Keeps `ema <- decay ema + (1 - decay) weights` and swaps it in while the module validates.

    Elementwise on each rank's own tensors: nothing is gathered or deep-copied, so it holds for sharded weights.

    A long average lags behind: at a decay of 0.98 a run of 20 steps would export two thirds of what it began with.
    `train.py` refuses such a run (`cli/doctor_checks.py`). With `warmup` the first updates count more, as in `EMAModel`
    of diffusers (there 9): the n-th, from 0, uses

        min(decay, (1 + n) / (1 + n + warmup)).

    Args:
        decay: in [0, 1); 0 follows the weights.
        every: optimizer steps between updates.
        warmup: 0 or more; the decay is reached after `warmup * decay / (1 - decay)` updates. 0 uses it from the start.
    """

    def __init__(self, decay: float = 0.9, every: int = 1, warmup: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"WeightEMA decay is {decay}; it must lie in [0, 1). At 1 nothing would ever be learnt.")
        if every < 1:
            raise ValueError(f"WeightEMA every is {every}; it must be at least 1.")
        if not 0 <= warmup < float("inf"):
            raise ValueError(f"WeightEMA warmup is {warmup}; it must be 0 or more.")
        self.decay, self.every, self.warmup = decay, every, warmup
        self.shadow: ShadowWeights | None = None
        self._restored: dict[str, Any] | None = None
        self._last_step = 0
        self._updates = 0
        self._swapped = False

    @override
    def demands(self) -> Demands:
        advice = "Lower WeightEMA's decay or every, or give it a warmup (--callbacks.ema.warmup=9)"
        return Demands(averages=(Average(name="average (EMA)", share_of_start=self.share_of_start, advice=advice),))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.shadow = pl_module.average = ShadowWeights(pl_module)
        self._restore()

    def _restore(self) -> None:
        if self.shadow is not None and self._restored is not None:
            self.shadow.load_state_dict(self._restored["weights"])
            self._last_step = self._restored["last_step"]
            # checkpoints from before there was a warmup hold no count, and do not need it
            self._updates = self._restored.get("updates", self._last_step // self.every)
            self._restored = None

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step - self._last_step >= self.every:
            self._last_step = trainer.global_step
            self.shadow.blend(self.decay_after(self._updates))
            self._updates += 1

    def decay_after(self, updates: int) -> float:
        """Decay of the next update when there have been so many."""
        return min(self.decay, (1 + updates) / (1 + updates + self.warmup))

    def share_of_start(self, iterations: int, steps: int) -> float:
        """Share of the weights from before training in the average at the end of a run: the product of its decays.

        Args:
            iterations: of the run; the average follows at the end of one.
            steps: optimizer steps of each.
        """
        updates = iterations // math.ceil(self.every / steps)
        return math.prod(self.decay_after(n) for n in range(updates))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._swapped:  # a checkpoint that is saved on the way out must not take the average for the weights
            self._swap()

    def _swap(self) -> None:
        if self.shadow is not None:
            self.shadow.swap()
            self._swapped = not self._swapped

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.shadow is None:
            return {}
        return {"weights": self.shadow.state_dict(), "last_step": self._last_step, "updates": self._updates}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
        self._restore()  # strategies that shard restore callbacks after `on_fit_start`
