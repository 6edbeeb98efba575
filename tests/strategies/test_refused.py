"""What does not work on several ranks is refused before a model loads."""

from __future__ import annotations

from functools import partial

import bitsandbytes
import pytest
import torch
from lightning import Trainer

from flow_rl.distributed.optimizers import why_unshardable
from strategies.checks import check_sampler, check_sharded_optimizer


@pytest.mark.parametrize("kind", [bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.PagedAdamW8bit])
def test_optimizers_that_cannot_take_shards_are_refused(policy, kind) -> None:
    module = policy("nft", optimizer=partial(kind, lr=1e-3))
    with pytest.raises(ValueError, match=rf"{kind.__name__}.*DTensors.*torch\.optim\.AdamW"):
        check_sharded_optimizer(module)


def test_low_bit_states_that_shards_lose_are_refused(policy) -> None:
    made = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "torchao.optim.adam"})  # torchao need not be there
    with pytest.raises(ValueError, match=r"torchao's AdamW8bit.*checkpoint.*torch\.optim\.AdamW"):
        check_sharded_optimizer(policy("nft", optimizer=partial(made, lr=1e-3)))


def test_adamw_fused_or_not_is_taken(policy) -> None:
    for fused in (False, True):
        make = partial(torch.optim.AdamW, lr=1e-3, fused=fused)
        check_sharded_optimizer(policy("nft", optimizer=make))
        assert why_unshardable(make) is None


def test_lightnings_sampler_is_refused() -> None:
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    with pytest.raises(ValueError, match="use_distributed_sampler is true"):
        check_sampler(Trainer(**quiet))
    check_sampler(Trainer(**quiet, use_distributed_sampler=False))
