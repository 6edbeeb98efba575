"""The workload that a stage states, against the evaluations that its training step makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning import Trainer

from callbacks import HackingMonitor, RewardRangeFilter, UpdateProbe, WeightEMA
from datamodules import AlternatingTaskDataModule
from flow_rl.distillation.settings import TeacherSettings
from flow_rl.flow.guidance import Guidance
from flow_rl.models import QwenImage21
from flow_rl.models.adapters import LoraSettings
from flow_rl.models.workload import Drawing, Generator, Teachers, Workload
from flow_rl.planning.setup import Setup
from flow_rl.planning.workload import workload_of
from flow_rl.rl.shadow_weights import ShadowWeights
from lightning_modules import FlowPretrain

BOTH = {"rollout": {"cfg": "both", "guidance": Guidance(scale=2.5), "allow_coarse_guidance": True}}


@pytest.fixture
def evaluated(monkeypatch) -> Counter[str]:
    """Samples that velocities are computed for, and those that a gradient comes back to."""
    found: Counter[str] = Counter()
    own = QwenImage21.velocity

    def velocity(self, latents, *args, **kwargs):
        result = own(self, latents, *args, **kwargs)
        found["forward"] += len(latents)
        if result.requires_grad:
            result.register_hook(lambda _: found.update(backward=len(latents)))
        return result

    monkeypatch.setattr(QwenImage21, "velocity", velocity)
    return found


def fit(module, data) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    steps = module.profile().updates
    Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, logger=False, **quiet).fit(module, datamodule=data)


def stated(work: Workload) -> Counter[str]:
    found: Counter[str] = Counter()
    for phase in work.phases:
        found.update(forward=phase.evaluations, backward=phase.evaluations * phase.backward)
    return found


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("nft", {}),
        ("nft", {"objective": {"updates": 2}}),
        ("nft", {"objective": {"old_decay": 0.0, "reference_weight": 0.0}}),
        ("nft", {"lora": LoraSettings(rank=2, alpha=4)}),
        ("clipped", {}),
        ("clipped", {"objective": {"updates": 2}}),
        ("guarded", {"objective": {"kl_weight": 0.1}}),
        ("clipped", BOTH),
    ],
)
def test_policy(kind, changes, policy, data, evaluated) -> None:
    module, prompts = policy(kind, **changes), data()
    work = module.workload(prompts, ranks=1)
    assert (work.groups, work.source) == (2, 0)
    fit(module, prompts)
    assert evaluated == stated(work)
    kept = [name for name in ("old", "reference") if isinstance(getattr(module, name), ShadowWeights)]
    assert [name.split()[0] for name in work.copies] == kept


def test_policy_of_two_tasks(policy, mixed, evaluated) -> None:
    module = policy("nft")
    work = module.workload(mixed, ranks=1)
    assert work.groups == 3
    assert work.source == work.target
    fit(module, mixed)
    assert evaluated == stated(work)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_student(scale, student, t2i_teacher, data, evaluated) -> None:
    teachers = {"t2i": TeacherSettings(path=t2i_teacher, guidance=Guidance(scale=scale))}
    module, prompts = student(teachers=teachers), data()
    work = module.workload(prompts, ranks=1)
    assert work.teachers == Teachers(copies=1, sharded=True, guided=scale != 1)
    fit(module, prompts)
    # The plan counts every step of the rollout; the last one leads to an image, which nobody learns at.
    assert evaluated + Counter(forward=work.samples_a_rank) == stated(work)


def test_ranks_share_what_one_rank_does(policy, data) -> None:
    module, prompts = policy("clipped"), data(prompts_per_step=4)
    one, four = (module.workload(prompts, ranks=ranks) for ranks in (1, 4))
    assert one.pairs == four.pairs
    assert [phase.evaluations for phase in one.phases] == [4 * phase.evaluations for phase in four.phases]


def test_batches_of_one_task_count_the_larger_one(data, edits, mixed) -> None:
    tasks = {"t2i": data(prompts_per_step=3), "edit": edits(prompts_per_step=2)}
    alternating = AlternatingTaskDataModule(**tasks)
    assert (data().prompts_per_iteration, mixed.prompts_per_iteration, alternating.prompts_per_iteration) == (2, 3, 3)
    assert (data().edits, edits().edits, mixed.edits) == (False, True, True)
    assert (data().task_at(0), mixed.task_at(0)) == (None, None)
    assert alternating.task_at(0) in tasks


def test_what_callbacks_draw_is_part_of_the_run(policy, data) -> None:
    callbacks = [UpdateProbe(prompts=3), WeightEMA(), HackingMonitor(prompts=4, members=2)]
    demands = [callback.demands() for callback in callbacks]
    setup = Setup(model=policy("nft"), data=data(eval_batch_size=5), trainer={"devices": 2}, demands=demands)
    work = workload_of(setup)
    probe, monitor, validation = work.drawings
    assert (probe.name, probe.prompts, probe.members, probe.keeps_weights) == ("probe", 3, 1, True)
    assert (monitor.name, monitor.prompts, monitor.members, monitor.keeps_weights) == ("monitor", 4, 2, False)
    assert validation == Drawing(name="validation", prompts=5, swaps_weights=True)
    assert [work.prompts_of(drawing) for drawing in work.drawings] == [2, 2, 3]  # a rank's share
    assert workload_of(replace(setup, trainer={"limit_val_batches": 0}, demands=())).drawings == ()


def test_a_batch_bounds_what_is_drawn_at_a_time(policy, data) -> None:
    work = policy("nft", rollout={"batch_size": 6}).workload(data(), ranks=1)
    assert work.prompts_of(Drawing(name="monitor", prompts=50, members=2)) == 3
    assert work.prompts_of(Drawing(name="monitor", prompts=50, members=8)) == 1


def test_missing_scores_of_a_filter(tmp_path) -> None:
    there, gone = tmp_path / "there.pt", tmp_path / "gone.pt"
    there.touch()
    (told,) = RewardRangeFilter(scores={"t2i": str(there), "edit": str(gone)}).demands().missing
    assert str(gone) in told
    assert RewardRangeFilter(scores=str(gone), sample_missing=True).demands().missing == ()
    assert RewardRangeFilter(online=True).demands().missing == ()


def test_stages_without_a_count(tiny_path) -> None:
    module = FlowPretrain(tiny_path, 32, partial(torch.optim.AdamW, lr=1e-3))
    assert module.workload(None, ranks=1) is None
    assert module.profile().generator == Generator(model_path=tiny_path, image_size=32)
    assert not module.profile().manual
