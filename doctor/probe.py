"""What a forward with gradient keeps in memory and costs: a transformer's own blocks are run on the meta device.

Nothing is computed there, but autograd saves what it would save: the count follows diffusers' code by itself. Attention
is replaced by a stand-in that keeps what fused kernels keep (queries, keys, values, the output and one number a row).

Shapes: M samples, P distinct prompts, L text tokens, S target tokens, Z source tokens, D channels of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")
#: target tokens that a prefix is extracted with (see `QwenImage21._extract`)
BLANK_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one forward is given.

    Attributes:
        samples: M.
        prompts: P, distinct prompts among them.
        text: L, tokens of a prompt.
        source: Z, tokens of a source image; 0 for text-to-image.
        target: S, tokens of the image to make.
    """

    samples: int
    prompts: int
    text: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part of a forward costs.

    Attributes:
        saved: bytes that autograd keeps for the backward pass, each storage once, weights left out.
        inputs: of them, bytes that remain with gradient checkpointing.
        flops: floating-point operations of the forward.
    """

    saved: int
    inputs: int
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(saved=self.saved + other.saved, inputs=self.inputs + other.inputs, flops=self.flops + other.flops)

    def __mul__(self, times: int) -> Cost:
        return Cost(saved=self.saved * times, inputs=self.inputs * times, flops=self.flops * times)


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """A whole forward: `layers` times `block`, and the `ends` around them."""

    block: Cost
    ends: Cost
    layers: int

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward."""
        return (self.block * self.layers + self.ends).flops

    def activations(self, *, checkpointing: bool) -> int:
        """Bytes at the peak of the backward pass: all blocks' tensors, or all inputs and one block recomputed."""
        if not checkpointing:
            return (self.block * self.layers + self.ends).saved
        return self.block.inputs * self.layers + self.ends.saved + self.block.saved


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("the stand-in for attention is for counting alone")


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel keeps it; counts its operations, which the flop counter cannot see."""

    flops = 0.0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value = given["query"], given["key"], given["value"]
        self.flops += 4.0 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1]
        return _Attention.apply(query, key, value)


def measure(function: Callable[..., Any], *inputs: Tensor, weights: nn.Module | None = None) -> Cost:
    """Run `function(*inputs)` and count.

    Args:
        function: anything differentiable.
        inputs: what gradient checkpointing would keep.
        weights: a module whose parameters and buffers are not counted.
    """
    own = set() if weights is None else {_storage(t) for t in (*weights.parameters(), *weights.buffers())}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no storage's address is used again

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    with (
        torch.enable_grad(),
        FlopCounterMode(display=False) as counter,
        _FusedAttention() as attention,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        outputs = function(*inputs)
    del outputs
    return Cost(
        saved=sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        inputs=sum(tensor.untyped_storage().nbytes() for tensor in inputs),
        flops=counter.get_total_flops() + attention.flops,
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def forward_cost(transformer: nn.Module, load: Load, dtype: torch.dtype = torch.float32) -> ForwardCost:
    """Cost of a forward with gradient, of a transformer on the meta device.

    Args:
        transformer: with its adapters, if any, and `requires_grad` as in training; its first block and what is not a
            block are of `dtype`.
        load: of the forward.
        dtype: what blocks compute in.

    Raises:
        ValueError: a class without a probe.
    """
    probe = PROBES.get(type(transformer).__name__)
    if probe is None:
        raise ValueError(f"No probe for {type(transformer).__name__}; there is one for {', '.join(PROBES)}.")
    block, ends = probe(transformer, load, dtype)
    return ForwardCost(block=block, ends=ends, layers=len(transformer.transformer_blocks))


def _probe_21(transformer: nn.Module, load: Load, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Qwen-Image 2.1: the prefix of every prompt once, then the targets against its keys and values."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    block, config = transformer.transformer_blocks[0], transformer.config
    heads, head, dim = config.num_attention_heads, config.attention_head_dim, transformer.inner_dim
    empty = _maker(dtype)
    before = load.text + load.source

    def extract(hidden: Tensor, modulation: Tensor) -> Tensor:
        segments = [(0, load.text, True)] + ([(load.text, before, False)] if load.source else [])
        cache = QwenImage21KVCache(1).get_layer(0)
        target = torch.arange(before + BLANK_TOKENS, device=META) >= before
        turn = torch.empty(before + BLANK_TOKENS, head // 2, dtype=torch.complex64, device=META)
        return block(
            hidden, modulation, turn, None, target, cache, "extract", slice(0, before), segments, None
        ), cache.k, cache.v  # fmt: skip

    def denoise(hidden: Tensor, modulation: Tensor) -> Tensor:
        cache = QwenImage21KVCache(1).get_layer(0)
        cache.store(*(empty(load.samples, before, heads, head) for _ in range(2)))
        target = torch.ones(load.target, dtype=torch.bool, device=META)
        turn = torch.empty(load.target, head // 2, dtype=torch.complex64, device=META)
        return block(hidden, modulation, turn, None, target, cache, "cached", None, None, None)

    def ends(latents: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        hidden, embeds = transformer.img_in(latents), transformer.txt_in(text)
        time = transformer.time_text_embed(torch.zeros(load.samples + 1, dtype=dtype, device=META), hidden)
        target = torch.ones(load.target, dtype=torch.bool, device=META)
        last = transformer.norm_out(empty(load.samples, load.target, dim), time, target)
        return embeds, transformer.modulation(time), transformer.proj_out(last)

    rows, adapted = {"weights": transformer}, transformer.modulation[1].weight.requires_grad
    prefix = measure(
        extract,
        empty(load.prompts, before + BLANK_TOKENS, dim),
        empty(load.prompts + 1, 4 * dim, grad=adapted),
        **rows,
    )
    targets = measure(
        denoise, empty(load.samples, load.target, dim), empty(load.samples + 1, 4 * dim, grad=adapted), **rows
    )
    latents = torch.empty(load.samples, load.target, config.in_channels, dtype=dtype, device=META)
    text = torch.empty(load.prompts, load.text, config.context_in_dim, dtype=dtype, device=META)
    return prefix + targets, measure(ends, latents, text, **rows)


def _probe_v1(transformer: nn.Module, load: Load, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Qwen-Image v1: text and image streams of every sample through every block."""
    block, config = transformer.transformer_blocks[0], transformer.config
    head, dim, empty = config.attention_head_dim, transformer.inner_dim, _maker(dtype)
    tokens = load.target + load.source
    turns = tuple(torch.empty(n, head // 2, dtype=torch.complex64, device=META) for n in (tokens, load.text))

    def denoise(hidden: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return block(hidden, text, None, time, turns)

    def ends(latents: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        hidden, embeds = transformer.img_in(latents), transformer.txt_in(transformer.txt_norm(text))
        time = transformer.time_text_embed(torch.zeros(load.samples, dtype=dtype, device=META), hidden)
        return embeds, transformer.proj_out(transformer.norm_out(empty(load.samples, tokens, dim), time))

    # Under an adapter nothing is learnt of the time: products with its modulation then keep one factor only.
    learns_time = transformer.time_text_embed.timestep_embedder.linear_1.weight.requires_grad
    time = empty(load.samples, dim, grad=learns_time)
    streams = empty(load.samples, tokens, dim), empty(load.samples, load.text, dim), time
    latents = torch.empty(load.samples, tokens, config.in_channels, dtype=dtype, device=META)
    text = torch.empty(load.samples, load.text, config.joint_attention_dim, dtype=dtype, device=META)
    return (
        measure(denoise, *streams, weights=transformer),
        measure(ends, latents, text, weights=transformer),
    )


def _maker(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Makes activations of that dtype, which want a gradient unless told otherwise."""

    def empty(*shape: int, grad: bool = True) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META).requires_grad_(grad)

    return empty


PROBES: dict[str, Callable[[nn.Module, Load, torch.dtype], tuple[Cost, Cost]]] = {
    "QwenImage21Transformer2DModel": _probe_21,
    "QwenImageTransformer2DModel": _probe_v1,
}
