"""Compares how a run draws its images with how the released model is meant to be drawn from.

Steps, sizes and an experimental guidance are notes: a run may have its reasons. A guidance that is out of the model's
range is refused by the doctor, after the plan, and warned of at the start of a run: the images that are rewarded would
be other images than the model's users see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flow_rl.flow.guidance import Guidance
from flow_rl.models.native import NativeSampling, native_sampling
from flow_rl.planning.setup import Setup


def native_of(setup: Setup) -> NativeSampling | None:
    """The native sampling of the run's generator; None for a stage without one, or a generator of no released model."""
    generator = setup.profile.generator
    return None if generator is None else native_sampling(generator.model_path)


def describe(setup: Setup) -> list[str]:
    """Lines on the native sampling, and a note on each setting of the run that differs."""
    native = native_of(setup)
    if native is None:
        return []
    guidance = "none (scale 1)" if native.guidance == 1 else f"{native.guidance:g}"
    sizes = ", ".join(f"{width} x {height}" for width, height in native.sizes)
    own = f"; the model's own (width x height): {sizes}" if sizes else ""
    width, height = native.default_size
    lines = [
        f"native sampling of {native.model}",
        f"  guidance      {guidance}{', with rescaled norm' if native.rescale else ''}",
        f"  steps         {_either(native.num_steps)}",
        f"  sizes         {width} x {height} by default in diffusers{own}",
    ]
    return [*lines, *(f"  note: {note}" for note in (*_guidance_notes(setup, native), *_other_notes(setup, native)))]


def problems_of_guidance(setup: Setup) -> list[str]:
    """What is wrong with guidance that is out of the range of the run's generator."""
    native = native_of(setup)
    if native is None or native.highest_guidance is None:
        return []
    return [
        f"{where} is {guidance.scale:g}, which is out of range for {native.model}: {_meant(native)}. "
        f"{_remedy(where, native)}"
        for where, guidance in _guidances(setup).items()
        if guidance.scale > native.highest_guidance
    ]


def _guidance_notes(setup: Setup, native: NativeSampling) -> Iterator[str]:
    highest = native.highest_guidance or float("inf")
    for where, guidance in _guidances(setup).items():
        if guidance.scale > highest:
            continue  # a fault: see `problems_of_guidance`
        if guidance.scale != native.guidance:
            kind = "an experiment" if native.guidance == 1 else "right for a distilled student alone"
            if native.guidance != 1 and guidance.scale != 1:
                kind = "another guidance than its users'"
            yield f"{where} is {guidance.scale:g}, {kind}: {_meant(native)}. {_remedy(where, native)}"
        elif guidance.scale != 1 and (guidance.low > 0 or guidance.high < 1):
            yield (
                f"{where.removesuffix('.scale')} acts at {guidance.low:g} < sigma <= {guidance.high:g} alone, and "
                "diffusers guides every step. Set low to 0 and high to 1 for the native sampling."
            )


def _other_notes(setup: Setup, native: NativeSampling) -> Iterator[str]:
    size = setup.generator.image_size
    if size not in native.squares:
        yield (
            f"model.image_size is {size}; {native.model} is made for {_either(native.squares)}. At another size its "
            "images can be worse than what its users see: score the base at both (train.py test, --model.image_size) "
            "before you train."
        )
    for setting, steps in setup.profile.num_steps.items():
        if steps not in native.num_steps:
            why = "" if steps > max(native.num_steps) else " Fewer cost less, and the rewards see coarser images."
            yield f"{setting} is {steps}; {native.model} is sampled in {_either(native.num_steps)}.{why}"


def _guidances(setup: Setup) -> Mapping[str, Guidance]:
    """Every guidance that the run uses, by the setting of its scale."""
    return setup.profile.guidances if setup.stage == "fit" else setup.profile.drawn_guidances


def _meant(native: NativeSampling) -> str:
    if native.guidance == 1:
        return "the model is meant to be sampled without guidance (diffusers: true_cfg_scale 1.0)"
    return f"the model is meant to be sampled at guidance {native.guidance:g} (diffusers: true_cfg_scale)"


def _remedy(where: str, native: NativeSampling) -> str:
    if where == "model.guidance":
        return "Set it to 1: a student has learnt its teachers' guidance."
    if where != "model.rollout.guidance.scale":
        return f"Set it to {native.guidance:g}, or to the guidance that this teacher's rollouts had."
    if native.guidance == 1:
        return (
            f"Set it to 1 and model.rollout.cfg to none. As an experiment, a scale up to {native.highest_guidance:g} "
            "goes with cfg rollout_only."
        )
    rescale = " and model.rollout.guidance.rescale to true" if native.rescale else ""
    return f"Set it to {native.guidance:g}{rescale}, with model.rollout.cfg rollout_only."


def _either(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, numbers))
