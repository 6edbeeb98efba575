"""Part B: evaluations and updates at the dimensions of Qwen-Image 2.1, in order of value."""

from __future__ import annotations

from benchmarks.gpu.bench import Check
from benchmarks.gpu.breakdown import breakdown
from benchmarks.gpu.compilation import compilation
from benchmarks.gpu.evaluations import attention, built, decoders, evaluations, prefixes
from benchmarks.gpu.updates import updates

CHECKS = (
    Check(name="built", question="Memory of weights as built, against the plan.", run=built, seconds=25),
    Check(name="evaluations", question="Speed and memory of an evaluation.", run=evaluations, seconds=95),
    Check(name="updates", question="Speed and memory of an update's micro-batches.", run=updates, seconds=100),
    Check(name="breakdown", question="Where does the time go, by kind of kernel?", run=breakdown, seconds=40),
    Check(name="attention", question="Which attention kernel runs with a mask?", run=attention, seconds=25),
    Check(name="decoders", question="How many images should the VAE take at a time?", run=decoders, seconds=60),
    Check(name="prefixes", question="What do kept and shared prefixes bring?", run=prefixes, seconds=30),
    Check(name="compilation", question="What do compiled blocks bring?", run=compilation, seconds=120),
)
