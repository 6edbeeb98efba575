"""What a compiled block of Qwen-Image 2.1 sees: plain tensors whose sizes may change without another compilation."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from flow_rl.models.image_model import BlockForward


def cached_only(eager: BlockForward, compiled: BlockForward) -> BlockForward:
    """A block's forward that is compiled in "cached" mode and eager in the others.

    Extraction attends segment by segment, so its graph would differ for each prompt's length. Each call decides for
    itself, because gradient checkpointing calls a block again in the backward pass.

    Args:
        eager: the block's own forward.
        compiled: the same, compiled.
    """
    from torch._dynamo import maybe_mark_dynamic

    signature = inspect.signature(eager)

    def forward(*args: Any, **named: Any) -> Tensor:
        call = signature.bind(*args, **named).arguments
        if call.get("kv_cache_mode") != "cached":
            return eager(**call)
        # The first block gets a slice, all others a tensor of its own: the strides must not make two graphs.
        call["hidden_states"] = call["hidden_states"].contiguous()
        call["layer_cache"] = cache = call["layer_cache"].laid_out()
        for tensor in (cache.k, cache.v):
            maybe_mark_dynamic(tensor, (0, 1))  # samples and the prompt's length
        for name in ("hidden_states", "modulation", "attention_mask"):
            if call.get(name) is not None:
                maybe_mark_dynamic(call[name], 0)
        if call.get("attention_mask") is not None:
            maybe_mark_dynamic(call["attention_mask"], 3)
        return compiled(**call)

    return forward
