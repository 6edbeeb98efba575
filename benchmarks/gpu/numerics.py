"""Part A: does the device compute what the CPU does? The demo base, in order of value."""

from __future__ import annotations

from benchmarks.gpu.bench import Check
from benchmarks.gpu.first_ratio import first_ratio
from benchmarks.gpu.host_waits import host_waits
from benchmarks.gpu.machine import ceilings
from benchmarks.gpu.parity import parity
from benchmarks.gpu.teacher_swap import teacher_swap
from benchmarks.gpu.training import resume, sharded, stages

CHECKS = (
    Check(name="ceilings", question="How fast are matrix products and copies?", run=ceilings, seconds=10),
    Check(name="parity", question="Float32 on the device against float64 on the CPU.", run=parity, seconds=15),
    Check(name="first_ratio", question="Is the first ratio 1, bit for bit?", run=first_ratio, seconds=140),
    Check(name="stages", question="Does every demo stage train for two iterations?", run=stages, seconds=60),
    Check(name="teacher_swap", question="Do prefetched teachers answer with their own weights?", run=teacher_swap,
          seconds=10),
    Check(name="resume", question="Is a resumed run the uninterrupted one, bit for bit?", run=resume, seconds=35),
    Check(name="fsdp2", question="FSDP2 on one rank against none.", run=sharded, seconds=30),
    Check(name="host_waits", question="How often does the host wait for the device?", run=host_waits, seconds=20),
)  # fmt: skip
