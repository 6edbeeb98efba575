"""What the ranks draw together, as a rank sees it: looks, probes, validations, questions to the rewards, whole weights."""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from tests.planted import Brightness
from tests.processes import GROUP_TIMEOUT
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from callbacks import HackingMonitor, update_probe
from flow_rl.batches import Prompts
from flow_rl.rl.scoring import score_share
from flow_rl.distributed.shares import (Share, raised_everywhere)
from flow_rl.rewards import (Reward, Samples)


class Counting(Brightness):
    """Brightness that remembers how often it saw each image."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def score(self, samples: Samples) -> Tensor:
        scores = super().score(samples)
        self.seen.update(samples.prompts)
        return scores

    def statistics(self) -> dict[str, float]:
        return {"images": float(self.seen.total())}


class Witness(Callback):
    """Leaves what this rank saw in `directory/seen.<rank>`."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.found: dict[str, Any] = {"probes": [], "whole": Counter()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ask = update_probe.probe_gradient

        def kept(*args: Any, **kwargs: Any) -> Any:
            probe = ask(*args, **kwargs)
            self.found["probes"].append((probe.before, probe.after))
            return probe

        update_probe.probe_gradient = kept
        for stage in ("encode", "velocity", "decode"):
            self._watch(pl_module.model, stage)

    def _watch(self, model: nn.Module, stage: str) -> None:
        """Note which parts of the model are whole whenever a stage of drawing begins."""
        work = getattr(model, stage)

        def watched(*args: Any, **kwargs: Any) -> Any:
            whole = tuple(name for name, part in model.named_children() if _any_whole(part))
            self.found["whole"][stage, whole] += 1
            return work(*args, **kwargs)

        object.__setattr__(model, stage, watched)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.found.setdefault("drawn", []).append(outputs[""])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, HackingMonitor)]
        self.found["looks"] = [look for monitor in monitors for look in monitor.looks]
        self.found["validation"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        scorers = pl_module.rewards | getattr(pl_module, "monitors", {})
        self.found["asked"] = {name: scorer.seen for name, scorer in scorers.items() if isinstance(scorer, Counting)}
        torch.save(self.found, Path(self.directory) / f"seen.{trainer.global_rank}")


def _any_whole(part: nn.Module) -> bool:
    """Whether any weights of a sharded part have been gathered and not been released."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in part.modules() if isinstance(m, FSDPModule)]
    return any(group is not None and group.is_unsharded for group in groups)


class DownOnOneRank(Reward):
    """Raises on rank 1, and says that everything is mediocre elsewhere."""

    def score(self, samples: Samples) -> Tensor:
        if os.environ["LOCAL_RANK"] == "1":
            raise ConnectionError("nobody there")
        return torch.full((len(samples),), 3.0)


def share_rows(record: str, world_size: int) -> None:
    """Sums of rows that the ranks share, and what becomes of an error on one of them."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=GROUP_TIMEOUT))
    found: dict[str, Any] = {"rows": {}, "errors": []}
    for total in (1, 2, 3, 5, 8):
        share = Share.of(total)
        values = torch.tensor([[10.0 * row, 10.0 * row + 1] for row in share.rows]).flatten()  # two samples a row
        found["rows"][total] = (share.rows, share.own, share.gather(values))
    prompts = Prompts(ids=(1, 2), texts=("a", "b"), categories=("c", "c"))
    for rewards in ({"down": DownOnOneRank()}, {"brightness": Brightness()}):
        share = Share.of(3)
        try:
            found["scores"] = score_share(share, rewards, prompts, torch.rand(4, 3, 8, 8))
        except Exception as error:
            found["errors"].append((type(error).__name__, str(error)))
    with raised_everywhere():
        pass  # the ranks are still in step
    torch.save(found, f"{record}.{rank}")
    dist.destroy_process_group()
