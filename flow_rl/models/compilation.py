"""Compile the transformer's repeated blocks, one graph for all of them (regional compilation).

Eager kernels of norms, modulation and rotary embeddings are bound by memory: the compiler fuses them. Compiling a block
takes a minute at most, and every block of the transformer reuses the graph.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from flow_rl.models.image_model import ImageModel

#: graphs of one block that a run may need: with and without gradient, mask or adapter, and for a batch of one
GRAPHS = 32

Backend = str | Callable[..., object]


def compile_blocks(model: ImageModel, *, backend: Backend = "inductor") -> None:
    """Compile what repeats in the transformer, in place; the first forwards compile and take longer.

    Only each block's `forward` is replaced, so parameters keep their names, and hooks (those of sharding above all)
    and gradient checkpointing stay outside the graph. Call it before the transformer is sharded.

    Args:
        model: its transformer names its repeated blocks, as diffusers' do.
        backend: of `torch.compile`.

    Raises:
        ValueError: the transformer doesn't say which of its blocks repeat.
    """
    import torch._dynamo  # takes seconds, and most runs don't compile

    blocks = repeated_blocks(model.transformer)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in blocks:
        eager = block.forward
        block.forward = model.compiled_forward(eager, torch.compile(eager, fullgraph=True, backend=backend))
    model.compiled = True


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers' own regional compilation would compile.

    Raises:
        ValueError: there are none.
    """
    names = getattr(transformer, "_repeated_blocks", None) or ()
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"compile_blocks: {type(transformer).__name__} has no repeated blocks (`_repeated_blocks`: {list(names)}). "
            "Leave compile_blocks off for this model."
        )
    return blocks
