"""Denoising evaluations at real size: speed, memory against the plan, attention kernels, prefixes.

Shapes: N samples, S latent tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench, Row, gb
from benchmarks.gpu.machine import rates, tf32
from benchmarks.gpu.policies import planned, planned_moment_gb, planned_weights_gb, policy
from benchmarks.gpu.profiles import attention_kernels
from benchmarks.gpu.random_model import RandomQwenImage21, default_dtype, scale_of, shared_model
from benchmarks.gpu.timing import seconds
from flow_rl.flow.guidance import Guidance
from flow_rl.models.adapters import STUDENT_ADAPTER, use_adapter
from flow_rl.models.loading import config_directory
from flow_rl.models.vae import decode_frame
from flow_rl.rl.sampling import Branches, guided_velocity

SIGMA = 0.7
GUIDANCE = 4.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """N samples to denoise.

    Attributes:
        branches: of each sample, prefixes kept or not.
        latents: float32 (N, S, C).
    """

    branches: Branches
    latents: Tensor


@torch.no_grad()
def prepare(
    bench: Bench,
    model: RandomQwenImage21,
    *,
    size: int,
    edit: bool = False,
    guided: bool = True,
    prompts: tuple[str, ...] = ("x",),
    samples: int | None = None,
    cached: bool = True,
) -> Work:
    """Samples of some prompts, side by side."""
    model.image_size = (size, size)
    count = samples or scale_of(bench).samples
    images = torch.rand(len(prompts), 3, size, size, device=bench.device) if edit else None
    blank = None
    if guided:
        blank = model.encode([""] * len(prompts), images) if edit else model.encode([""]).select([0] * len(prompts))
    branches = Branches(conditional=model.encode(prompts, images), unconditional=blank)
    if cached:
        branches = branches.cached(model)
    latents = torch.randn(count, *model.latent_shape(size, size), device=bench.device)
    return Work(branches=branches.repeat_interleave(count // len(prompts)), latents=latents)


def evaluation(model: RandomQwenImage21, work: Work) -> Callable[[], Tensor]:
    """One evaluation, guided if the work has a blank branch."""
    guidance = Guidance(scale=1.0 if work.branches.unconditional is None else GUIDANCE)
    velocity = guided_velocity(model, work.branches.conditional, work.branches.unconditional, guidance)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return velocity(work.latents, 0, SIGMA)

    return evaluate


def flops_of(model: RandomQwenImage21, function: Callable[[], Any]) -> tuple[float, Any]:
    """Operations of a call's forwards and backwards, and what it returns."""
    found: list[float] = []
    model.on_flops = found.append
    try:
        result = function()
    finally:
        model.on_flops = None
    return sum(found), result


def built(bench: Bench) -> Iterator[Row]:
    """Memory that weights take as they are built, against the plan, and one pass through the text encoder."""
    scale = scale_of(bench)
    plan = planned(bench, policy(scale))
    before = bench.allocated()
    model = shared_model(bench)
    bench.synchronize()
    taken = None if before is None else gb(bench.allocated() - before)
    finite = bool(torch.isfinite(evaluation(model, prepare(bench, model, size=scale.size, samples=1))()).all())
    yield Row(
        name="transformer, LoRA and VAE",
        values={
            "gb": taken,
            "planned_gb": planned_weights_gb(plan, "transformer", "VAE"),
            "not_finite": int(not finite),
            "parameters": sum(p.numel() for p in model.transformer.parameters()),
        },
        limits={"not_finite": 0},
    )
    yield from _text_encoder(bench, planned_weights_gb(plan, "text encoder"))


def _text_encoder(bench: Bench, plan: float) -> Iterator[Row]:
    scale, before = scale_of(bench), bench.allocated()
    config = transformers.AutoConfig.from_pretrained(str(config_directory(scale.card) / "text_encoder"))
    with default_dtype(scale.dtype), bench.device:
        encoder = getattr(transformers, config.architectures[0])._from_config(config, dtype=scale.dtype).eval()
    bench.synchronize()
    taken = None if before is None else gb(bench.allocated() - before)
    ids = torch.randint(0, config.text_config.vocab_size // 2, (1, scale.text), device=bench.device)

    @torch.no_grad()
    def encode() -> Tensor:
        return encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]

    def measure() -> dict[str, Any]:
        return {
            "gb": taken,
            "planned_gb": plan,
            "seconds": seconds(bench, encode),
            "not_finite": int(not bool(torch.isfinite(encode()).all())),
        }

    yield bench.row(f"text encoder, a prompt of {scale.text} tokens", measure, {"not_finite": 0})


def evaluations(bench: Bench) -> Iterator[Row]:
    """One evaluation of all samples with prefixes kept: guided and not, both sizes, edits, with and without LoRA."""
    scale = scale_of(bench)
    model = shared_model(bench)
    for size, edit, guided, lora in (
        (scale.size, False, True, True), (scale.size, False, False, True), (scale.size, False, False, False),
        (scale.size, True, True, True), (scale.size, True, False, True), (scale.large, False, True, True),
        (scale.large, False, False, True),
    ):  # fmt: skip
        plan = planned(bench, policy(scale, size=size, guidance=GUIDANCE if guided else 1.0), edit=edit)
        expected = planned_moment_gb(plan, "denoise")

        def measure(
            size: int = size, edit: bool = edit, guided: bool = guided, lora: bool = lora, expected: float = expected
        ) -> dict[str, Any]:
            use_adapter(model.transformer, STUDENT_ADAPTER if lora else None)
            try:
                work = prepare(bench, model, size=size, edit=edit, guided=guided)
                bench.reset_peak()  # of the evaluation, not of the VAE that encoded a source
                evaluate = evaluation(model, work)
                flops, output = flops_of(model, evaluate)
                taken = seconds(bench, evaluate)
            finally:
                use_adapter(model.transformer, STUDENT_ADAPTER)
            tokens = work.latents.shape[0] * work.latents.shape[1]
            return {
                "seconds": taken,
                "tokens_per_s": tokens / taken,
                **rates(bench, flops, taken),
                "planned_gb": expected,
                "not_finite": int(not bool(torch.isfinite(output).all())),
            }

        name = f"{'edit' if edit else 't2i'} {size}, {'guided' if guided else 'conditional'}"
        yield bench.row(f"{name}, {'LoRA' if lora else 'base'}, N = {scale.samples}", measure, {"not_finite": 0})


def attention(bench: Bench) -> Iterator[Row]:
    """Attention as the model calls it, with and without the padding's mask: time, and which kernel ran."""
    scale = scale_of(bench)
    model = shared_model(bench)
    config = model.transformer.config
    tokens = model.latent_shape(scale.size, scale.size)[0]
    shape = (scale.samples, config.num_attention_heads, tokens, config.attention_head_dim)
    longer = (*shape[:2], tokens + scale.text, shape[3])
    for masked in (False, True):
        for backward in (False, True):
            query, key, value = (
                torch.randn(size, device=bench.device, dtype=scale.dtype, requires_grad=backward)
                for size in (shape, longer, longer)
            )
            valid = torch.ones(shape[0], 1, 1, longer[2], dtype=torch.bool, device=bench.device)
            valid[::2, ..., : scale.text // 2] = False
            mask = valid if masked else None

            def attend(q: Tensor = query, k: Tensor = key, v: Tensor = value, mask: Tensor | None = mask) -> None:
                output = scaled_dot_product_attention(q, k, v, attn_mask=mask)
                if output.requires_grad:
                    output.sum().backward()

            flops = 4 * shape[0] * shape[1] * tokens * longer[2] * shape[3] * (3.5 if backward else 1.0)
            name = f"{'with' if masked else 'without'} mask, {'forward and backward' if backward else 'forward'}"

            def measure(attend: Callable[[], None] = attend, flops: float = flops) -> dict[str, Any]:
                taken = seconds(bench, attend, repeats=10)
                return {"seconds": taken, **rates(bench, flops, taken), "kernels": attention_kernels(bench, attend)}

            yield bench.row(name, measure)
    for prompts, name in ((("x",), "model, one prompt"), (("x", ""), "model, two prompts of different length")):
        work = prepare(bench, model, size=scale.size, guided=False, prompts=prompts)
        evaluate = evaluation(model, work)
        yield Row(
            name=name,
            values={"seconds": seconds(bench, evaluate), "kernels": attention_kernels(bench, evaluate)},
        )


def prefixes(bench: Bench) -> Iterator[Row]:
    """The same samples with prefixes kept, made anew in every evaluation, and prefix and target in one forward."""
    scale = scale_of(bench)
    model = shared_model(bench)
    for edit in (False, True):
        task = "edit" if edit else "t2i"
        kept = prepare(bench, model, size=scale.size, edit=edit, guided=False)
        anew = prepare(bench, model, size=scale.size, edit=edit, guided=False, cached=False)
        alone = replace(anew, branches=Branches(conditional=separate(anew.branches.conditional), unconditional=None))
        first = None
        for name, work in (("kept", kept), ("made anew", anew), ("one forward, no sharing", alone)):
            evaluate = evaluation(model, replace(work, latents=kept.latents))
            row = bench.row(f"{task} {scale.size}, prefix {name}", lambda e=evaluate: {"seconds": seconds(bench, e)})
            taken = row.values.get("seconds")
            first = first or taken
            yield replace(row, values={**row.values, "times": taken / first if taken and first else None})


def separate(conditioning: Any) -> Any:
    """Every sample with a prompt of its own: nothing is shared, as in diffusers' pipelines."""
    rows = conditioning.rows.tolist()
    source = conditioning.source_latents
    return replace(
        conditioning,
        embeds=tuple(conditioning.embeds[row] for row in rows),
        image_slots=tuple(conditioning.image_slots[row] for row in rows),
        source_latents=None if source is None else source[rows],
        rows=torch.arange(len(rows)),
    )


def decoders(bench: Bench) -> Iterator[Row]:
    """The VAE by images at a time, in float32 with TF32 off and on, and in bfloat16: seconds an image and memory."""
    scale = scale_of(bench)
    model = shared_model(bench)
    channels = model.vae.config.z_dim
    for size in (scale.size, scale.large):
        grid = model.grid((size, size))
        for chunk, rounded, dtype in (
            *((c, False, torch.float32) for c in (1, 4, 16)),
            (4, True, torch.float32),
            (4, False, torch.bfloat16),
        ):  # fmt: skip
            if chunk > scale.samples or (size == scale.large and chunk > 4):
                continue
            latents = torch.randn(chunk, channels, 1, *grid, device=bench.device, dtype=dtype)

            def measure(
                latents: Tensor = latents, rounded: bool = rounded, chunk: int = chunk, dtype: torch.dtype = dtype
            ) -> dict[str, Any]:
                model.vae.to(dtype)
                try:
                    with torch.no_grad(), tf32(rounded):
                        taken = seconds(bench, lambda: decode_frame(model.vae, latents), repeats=3)
                finally:
                    model.vae.to(torch.float32)
                return {"seconds_an_image": taken / chunk}

            how = "bfloat16" if dtype == torch.bfloat16 else f"float32, TF32 {'on' if rounded else 'off'}"
            yield bench.row(f"decode {size}, {chunk} at a time, {how}", measure)
        count = scale.samples if size == scale.size else min(scale.samples, 4)
        whole = torch.randn(count, *model.latent_shape(size, size), device=bench.device)

        def shipped(whole: Tensor = whole, size: int = size) -> dict[str, Any]:
            model.image_size = (size, size)
            return {"seconds_an_image": seconds(bench, lambda: model.decode(whole), repeats=2) / len(whole)}

        yield bench.row(f"decode {size}, {count} as shipped", shipped)
