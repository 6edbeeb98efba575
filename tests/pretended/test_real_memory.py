"""What the real model's phases hold on a GPU, against what the GPUs of the configs have."""

from __future__ import annotations

import pytest

from tests.pretended.real_dimensions import Dimensions, phases, run_phases

GB = 10**9


def fullest(**dimensions: object) -> tuple[str, float]:
    """The phase with the highest peak, and that in GB."""
    found = phases(Dimensions(**dimensions))
    phase = max(found, key=lambda name: found[name].peak)
    return phase, found[phase].peak / GB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimensions", "bar"),
    [
        ({"kind": "lora", "task": "t2i", "size": 512}, 50),
        ({"kind": "lora", "task": "edit", "size": 1024}, 65),
        ({"kind": "fsdp", "task": "t2i", "size": 512, "ranks": 8, "micro_batch": 4}, 50),
    ],
    ids=["lora t2i 512", "lora edit 1024", "fsdp t2i 512"],
)
def test_fullest_moment_leaves_room_on_80_gb(dimensions: dict, bar: float) -> None:
    phase, peak = fullest(**dimensions)
    assert peak <= bar, f"{phase} holds {peak:.1f} GB"


@pytest.mark.slow
def test_two_short_transformers_tell_the_bytes_of_a_longer_one() -> None:
    dimensions = Dimensions(kind="lora", task="edit", size=256, blocks=8)
    told, run = phases(dimensions), run_phases(dimensions, blocks=8)
    assert told.keys() == run.keys()
    for phase in run:
        assert told[phase].before == pytest.approx(run[phase].before, rel=1e-4)
        assert told[phase].peak == pytest.approx(run[phase].peak, rel=1e-3), phase
