"""The plan as text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from flow_rl.models.loading import CARDS, config_directory
from flow_rl.planning.devices import Device
from flow_rl.planning.memory import Item
from flow_rl.planning.plan import Plan
from flow_rl.planning.weights import Components, count, trained


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9."""
    return f"{size / 1e9:.2f} GB"


def parameters(parts: Components) -> list[str]:
    """Lines on the components' sizes."""
    lines = ["parameters"]
    for name, module in vars(parts).items():
        lines.append(f"  {name:<14}{count(module.parameters()):>17,}")
    return [*lines, f"  {'trained':<14}{count(trained(parts.transformer)):>17,}"]


def sources(path: str) -> list[str]:
    """Where the dimensions come from, for a model that was not downloaded."""
    directory = config_directory(path)
    if not directory.is_relative_to(CARDS):
        return []
    card = json.loads((directory / "card.json").read_text(encoding="utf-8"))
    said = [f"  {part:<14}{text}" for part, text in card["dimensions"].items()]
    return [f"{path} is not downloaded; its dimensions are those of the card that ships with this project:", *said]


def workload(plan: Plan) -> list[str]:
    """Lines on what an iteration does."""
    work = plan.work
    return [
        "an iteration",
        f"  groups x images        {work.groups} x {work.group_size} = {work.groups * work.group_size} samples, "
        f"{work.samples_a_rank} a rank on {work.ranks}",
        f"  updates                {work.updates}, each of {work.pairs} (sample, step) pairs",
        f"  micro-batch            {work.micro_batch} pairs: {work.accumulation} backwards a rank for an update",
        f"  tokens of a sample     {work.target} target + {work.source} source + {work.text} text (assumed)",
        "  evaluations a rank (samples x denoising evaluations) and floating-point operations",
        *(
            f"    {phase.name:<24}{phase.evaluations:>9,}{operations(plan.compute.phases[phase.name]):>20}"
            for phase in work.phases
        ),
        f"    {'all':<24}{'':>9}{operations(plan.compute.total):>20}",
    ]


def operations(count: float) -> str:
    """A number of operations with a unit that suits it, such as `1,234.5 TFLOP`."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP")
    power = min(len(units) - 1, max(0, int(math.log10(max(count, 1.0)) // 3)))
    return f"{count / 1000**power:,.1f} {units[power]}"


def memory(plan: Plan) -> list[str]:
    """Lines on one rank's memory."""
    held = plan.memory
    lines = [f"memory of a rank ({plan.setup.strategy}, weights over {plan.setup.shards})", "  always"]
    lines += _items(held.always)
    lines.append("  beside it, moment by moment")
    for moment in held.moments:
        mark = "  <- the fullest" if moment is held.fullest else ""
        lines.append(f"    {moment.name:<34}{gigabytes(moment.size):>12}{mark}")
        lines += [f"  {line}" for line in _items(moment.items)] if len(moment.items) > 1 else []
    return [*lines, f"  {'at the fullest':<36}{gigabytes(plan.peak):>12}   {held.fullest.name}"]


def _items(items: Sequence[Item]) -> list[str]:
    lines = []
    for item in items:
        host = f"  + {gigabytes(item.host)} on the host" if item.host else ""
        lines.append(f"    {item.name:<34}{gigabytes(item.size):>12}{host}")
    return lines


def speed(plan: Plan, device: Device, utilisation: float) -> list[str]:
    """Lines on a device."""
    seconds = plan.compute.seconds(device, utilisation)
    return [
        f"on {device.name} ({device.memory / 1e9:.0f} GB, {device.tflops:.0f} TFLOP/s bf16: the vendor's figures)",
        f"  {seconds:,.0f} s an iteration at an assumed utilisation of {utilisation:.0%}, rewards not counted",
    ]


def overrides(plan: Plan) -> list[str]:
    """The command line that makes a run as proposed."""
    work, setup = plan.work, plan.setup
    lines = [
        f"  --trainer.devices={work.ranks} --trainer.num_nodes=1   (or as many over several nodes)",
        f"  --{work.options.micro_batch}={work.micro_batch} --{work.options.rollout_batch}={work.rollout_batch}",
        f"  --model.gradient_checkpointing={str(setup.checkpointing).lower()}",
    ]
    if setup.offload:
        lines.append("  --trainer.strategy.init_args.cpu_offload=true")
    kept = f"{work.groups} x {work.group_size} x {work.updates}"
    return [
        "proposal",
        *lines,
        f"  groups x size x updates stay {kept}; {work.accumulation} backwards are added up for an update",
    ]
