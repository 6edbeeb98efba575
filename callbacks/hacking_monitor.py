"""Watches a run for reward hacking with scorers that it is never trained on, and for drift away from the base."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import ConcatDataset, DataLoader
from typing_extensions import override

from callbacks.tensorboard import writers
from datamodules.prompts import FixedBatches
from flow_rl.batches import Prompts
from flow_rl.files import replace_file, writing
from flow_rl.models.workload import Drawing
from flow_rl.monitoring.alerts import Alert, bands_with_defaults
from flow_rl.monitoring.hacking import Band, Finding, find_drift, find_hacking
from flow_rl.monitoring.panel import MonitorPanel, PanelRecord
from flow_rl.planning.demands import Demanding, Demands
from flow_rl.rewards.composite import weighted_mean
from flow_rl.rl.iteration import Iteration

Action = Literal["warn", "stop", "raise_kl"]


class HackingMonitor(Callback, Demanding):
    """Draws a small fixed panel of validation prompts every few iterations and asks rewards and monitors about it.

    It alerts when the training reward rises while the mean of `model.monitors` falls, and when brightness, saturation,
    contrast, sharpness, diversity within a prompt or the latents' norm leave a band around what the base draws. What
    the curves mean, and what cannot be seen: docs/monitoring.md.

    Alerts are a warning in the log, text and the scalar `monitor/alert` in TensorBoard, and `alerts.jsonl` in the log
    directory. Panel, history, alerts and the raised KL weight are in checkpoints: a resumed run alerts as an
    uninterrupted one.

    Args:
        every: iterations between looks at the panel; the first is before training.
        prompts: validation prompts in the panel, evenly spaced in the file (shared by the tasks of a mixed run).
        members: images a prompt; diversity needs two.
        action: on an alert: `warn` does no more; `stop` ends the run after the iteration; `raise_kl` multiplies the
            objective's distance to the reference by `kl_factor` at every look with an alert.
        margin: a fall of the monitors up to this, in points of the 1..5 scale, is no reason for an alert.
        error_rate: bound on the chance of a false alert in a run, one bound for hacking and one for drift.
        bands: allowed relative changes by measure, in place of the default ones of the same names.
        kl_factor: see `action`.
        kl_cap: the weight is raised to at most so many times its configured value.
        rollouts: also log monitors and measures of the training rollouts of the same iterations.
    """

    def __init__(
        self,
        every: int = 5,
        prompts: int = 24,
        members: int = 2,
        action: Action = "warn",
        margin: float = 0.05,
        error_rate: float = 0.05,
        bands: dict[str, Band] | None = None,
        kl_factor: float = 2.0,
        kl_cap: float = 16.0,
        rollouts: bool = False,
    ) -> None:
        if every < 1 or members < 1 or prompts < 2:
            raise ValueError(
                f"HackingMonitor every is {every}, members {members} and prompts {prompts}: every and members must be "
                "at least 1, and prompts at least 2, as every test is made over prompts."
            )
        if action not in get_args(Action):
            raise ValueError(f"HackingMonitor action is '{action}'; it must be one of {', '.join(get_args(Action))}.")
        if margin < 0 or not 0 < error_rate < 1:
            raise ValueError(
                f"HackingMonitor margin is {margin} and error_rate {error_rate}: margin must not be negative, and "
                "error_rate must lie between 0 and 1."
            )
        if kl_factor <= 1 or kl_cap < kl_factor:
            raise ValueError(
                f"HackingMonitor kl_factor is {kl_factor} and kl_cap {kl_cap}: the factor must be above 1, and the cap "
                "no smaller than the factor."
            )
        self.every, self.prompts, self.members = every, prompts, members
        self.action, self.margin, self.error_rate = action, margin, error_rate
        self.bands = bands_with_defaults(bands, members)
        self.kl_factor, self.kl_cap, self.rollouts = kl_factor, kl_cap, rollouts
        self.panel: MonitorPanel | None = None
        self.looks: list[PanelRecord] = []
        self.alerts: list[Alert] = []
        self.kl_scale = 1.0
        self._active: set[str] = set()
        self._restored: dict[str, Any] | None = None

    @override
    def demands(self) -> Demands:
        return Demands(drawings=(Drawing(name="monitor", prompts=self.prompts, members=self.members),))

    # ----------------------------------------------------------------- hooks

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not getattr(pl_module, "monitors", None):
            raise ValueError(
                "HackingMonitor has nothing to compare the reward with: name at least one scorer under model.monitors, "
                "one that is not trained on."
            )
        if self.action == "raise_kl" and not pl_module.objective.uses_reference:
            raise ValueError(
                "HackingMonitor action 'raise_kl' multiplies the weight of the distance to the reference, but the "
                "objective has none: give it one above 0 (reference_weight of NFT, kl_weight of a policy gradient), or "
                "choose 'warn' or 'stop'."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._path = Path(trainer.log_dir or trainer.default_root_dir) / "alerts.jsonl"
        self.panel = MonitorPanel(pl_module, self._prompts(trainer), self.members)
        if self._restored is not None:
            self._restore(self._restored)
            self._restored = None
            self._scale_reference(pl_module)
        else:
            if pl_module.iteration > 0:
                rank_zero_warn(
                    f"HackingMonitor joins the run at iteration {pl_module.iteration}: it compares with the weights of "
                    "now, not with the base."
                )
            self._look(trainer, pl_module)
        self._write_alerts(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if pl_module.iteration % self.every == 0 and pl_module.iteration > self.looks[-1].iteration:
            self._look(trainer, pl_module, outputs["iteration"])
            self._decide(trainer, pl_module)

    def _prompts(self, trainer: Trainer) -> tuple[Prompts, ...]:
        if trainer.datamodule is None:
            raise ValueError("HackingMonitor takes its panel from the data module's validation prompts; there is none.")
        return panel_prompts(trainer.datamodule.val_dataloader(), self.prompts)

    # ----------------------------------------------------------------- one look

    def _look(self, trainer: Trainer, pl_module: LightningModule, iteration: Iteration | None = None) -> None:
        with pl_module.clock.phase("monitor"):
            look = self.panel.look()  # the same on every rank, and with it every decision
            self.looks.append(look)
            values = self._values(look)
            if self.rollouts and trainer.is_global_zero and iteration is not None:
                rollout = self.panel.rollout_measures(iteration)
                values |= {f"rollout/{name}": value for name, value in rollout.items()}
        self._log(trainer, values)

    def _values(self, look: PanelRecord) -> dict[str, float]:
        """What to log of a look."""
        values = {
            "proxy": weighted_mean(look.proxy, self.panel.weights()).nanmean(),
            "panel": look.panel.nanmean(dim=1).nanmean(),
            "unconditional_drift": look.unconditional_drift.mean(),
        }
        values |= {f"panel/{name}": look.panel[:, k].nanmean() for k, name in enumerate(self.panel.policy.monitors)}
        values |= {name: found.nanmean() for name, found in look.measures.items()}
        return {name: float(value) for name, value in values.items()} | dict(look.statistics)

    def _decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hacking = find_hacking(
            [look.proxy for look in self.looks],
            [look.panel for look in self.looks],
            weights=self.panel.weights(),
            members=self.members,
            margin=self.margin,
            error_rate=self.error_rate,
        )
        drift = find_drift(
            self.looks[0].measures,
            self.looks[-1].measures,
            self.bands,
            look=len(self.looks) - 1,
            error_rate=self.error_rate,
        )
        found = [finding for finding in (hacking, *drift) if finding.alert]
        new = [finding for finding in found if finding.kind not in self._active]
        self._active = {finding.kind for finding in found}
        if found and self.action == "raise_kl":
            self.kl_scale = min(self.kl_scale * self.kl_factor, self.kl_cap)
            self._scale_reference(pl_module)
        values = {"alert": float(len(found)), "p_hacking": hacking.p}
        if self.action == "raise_kl":
            values["kl_scale"] = self.kl_scale
        self._log(trainer, values)
        for finding in new:
            self._raise(trainer, finding)
        if new and self.action == "stop":
            trainer.should_stop = True

    def _raise(self, trainer: Trainer, finding: Finding) -> None:
        """Make a new alert visible; while it lasts, `monitor/alert` shows it."""
        iteration, since = self.looks[-1].iteration, self.looks[finding.since].iteration
        alert = Alert.of(
            finding, iteration=iteration, since=since, action=self.action, band=self.bands.get(finding.kind)
        )
        self.alerts.append(alert)
        rank_zero_warn(alert.message)
        for writer in writers(trainer):
            writer.add_text("monitor/alert", alert.message, iteration)
        self._write_alerts(trainer)

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Straight to the loggers, at the number of iterations done: `self.log` would drop looks between its steps."""
        kept = {f"monitor/{name}": value for name, value in values.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(kept, step=self.looks[-1].iteration)

    def _write_alerts(self, trainer: Trainer) -> None:
        """The file says what the state says: a resumed run must not keep alerts of iterations that it does again."""
        if trainer.fast_dev_run or not trainer.is_global_zero or not (self.alerts or self._path.exists()):
            return
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, "".join(json.dumps(asdict(alert)) + "\n" for alert in self.alerts).encode())

    def _scale_reference(self, pl_module: LightningModule) -> None:
        """Let the objective weigh its distance to the reference `kl_scale` times as configured."""
        pl_module.objective.reference_scale = self.kl_scale

    # ----------------------------------------------------------------- state

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.panel is None:
            return self._restored or {}
        return {
            "watched": self._watched(),
            "panel": self.panel.state_dict(),
            "looks": [vars(look) | {"measures": dict(look.measures)} for look in self.looks],
            "alerts": [asdict(alert) for alert in self.alerts],
            "active": sorted(self._active),
            "kl_scale": self.kl_scale,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def _watched(self) -> dict[str, Any]:
        """What makes looks comparable."""
        policy = self.panel.policy
        return {
            "prompts": self.panel.ids,
            "members": self.members,
            "rewards": list(policy.rewards),
            "monitors": list(policy.monitors),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        now = self._watched()
        for name, before in state["watched"].items():
            if now[name] != before:
                raise ValueError(
                    f"HackingMonitor cannot go on: the checkpoint's run watched other {name} ({before}) than this one "
                    f"({now[name]}), and looks at different things cannot be compared. Restore the setting, or start "
                    "from exported weights."
                )
        self.panel.load_state_dict(state["panel"])
        self.looks = [PanelRecord(**look) for look in state["looks"]]
        self.alerts = [Alert(**alert) for alert in state["alerts"]]
        self._active = set(state["active"])
        self.kl_scale = state["kl_scale"]


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
