"""The doctor's plan against the live bytes of a run on a pretended GPU, phase by phase, for five runs as shipped.

The pretended run is the project's code at the real model's dimensions with tensors of its own kind; weights, gradients
and activations come out of what it holds, not out of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from jsonargparse import set_parsing_settings

from cli import app
from cli.doctor import examined
from flow_rl.planning.plan import Plan, make_plan
from flow_rl.planning.weights import build
from tests.cli.real_runs import ROOT
from tests.pretended.real_dimensions import Dimensions, PhaseBytes, phases

FAMILY = "configs/qwen_image_21"
GUIDED = ("--model.rollout.cfg=rollout_only", "--model.rollout.guidance.scale=4")
#: the pretended run's phases by the doctor's moments
PHASES = {
    "prefix": "prefix", "denoise": "rollout", "decode": "decode", "encode sources": "encode",
    "update, forward": "update forward", "update, backward": "update backward",
}  # fmt: skip
#: what a pretended run of one micro-batch does not hold, or holds as weights
NOT_HELD = ("latents kept", "gathered transformer", "a block's gradients, reduced")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A stack of shipped configs with overrides, and the same for the pretended run."""

    stack: tuple[str, ...]
    overrides: tuple[str, ...] = GUIDED
    dimensions: Dimensions
    phases: tuple[str, ...] = tuple(PHASES)


ADAPTER = ("grpo_t2i", "lora_1x80gb")
UPDATE = ("update, forward", "update, backward")
RUNS = {
    "t2i 512 adapter": Run(stack=ADAPTER, dimensions=Dimensions(micro_batch=2)),
    "t2i 1024 adapter": Run(
        stack=ADAPTER,
        overrides=(*GUIDED, "--model.image_size=1024"),
        dimensions=Dimensions(micro_batch=2, size=1024),
    ),
    "edit 512 adapter": Run(
        stack=("grpo_edit", "lora_1x80gb"), dimensions=Dimensions(task="edit", micro_batch=2)
    ),
    "t2i 512 sharded": Run(stack=("grpo_t2i",), dimensions=Dimensions(kind="fsdp", micro_batch=4)),
    "student's update": Run(
        stack=("distill", "distill_lora_1x80gb"),
        overrides=("--model.distillation.micro_batch_size=4",),
        dimensions=Dimensions(task="edit", group=4, micro_batch=4),
        phases=UPDATE,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_of(stack: tuple[str, ...], overrides: tuple[str, ...], directory: Path) -> Plan:
    """The plan of a stack whose data need not be there."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # as cli.app.main does
    given = [f"--config={FAMILY}/{name}.yaml" for name in stack]
    setup, _ = examined("fit", [*given, *overrides, f"--run.dir={directory}"], app._run, app.FlowCLI)
    return make_plan(setup, build(setup.generator.model_path, setup.generator.lora))


def planned(plan: Plan, moment: str) -> int:
    """Bytes of a moment, without what the pretended run does not hold."""
    found = next(m for m in plan.memory.moments if m.name == moment)
    return sum(item.size for item in found.items if item.name not in NOT_HELD)


def held(found: dict[str, PhaseBytes], moment: str) -> int:
    """What the pretended run holds at a phase's peak beyond what it held before."""
    phase = found[PHASES[moment]]
    before = found["update forward"] if moment.startswith("update") else phase
    return phase.peak - before.before


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_phase_is_within_15_percent_of_the_pretended_run(name, tmp_path) -> None:
    run = RUNS[name]
    plan, found = plan_of(run.stack, run.overrides, tmp_path), phases(run.dimensions)
    compared = {
        moment: (planned(plan, moment), held(found, moment)) for moment in run.phases if PHASES[moment] in found
    }
    print({moment: tuple(round(size / 1e9, 3) for size in pair) for moment, pair in compared.items()})
    assert len(compared) >= 2
    for moment, (ours, theirs) in compared.items():
        assert ours == pytest.approx(theirs, rel=0.15), moment


@pytest.mark.slow
def test_weights_and_optimizer_are_those_of_the_pretended_run(tmp_path) -> None:
    run = RUNS["t2i 512 adapter"]
    plan, found = plan_of(run.stack, run.overrides, tmp_path), phases(run.dimensions)
    named = {item.name: item.size for item in plan.memory.always}
    ours = sum(named[name] for name in ("transformer", "optimizer states", "text encoder", "VAE"))
    assert ours == pytest.approx(found["prefix"].before, rel=0.01)
