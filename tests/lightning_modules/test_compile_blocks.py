"""The setting `compile_blocks` of the modules that train a generator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning import LightningModule

from flow_rl.models.adapters import LoraSettings
from flow_rl.models.compilation import repeated_blocks
from lightning_modules.base import TrainedModule


@pytest.mark.parametrize("fixture", ["policy", "student"])
def test_blocks_are_compiled_and_checkpoints_keep_their_names(request: pytest.FixtureRequest, fixture: str) -> None:
    make: Callable[..., LightningModule] = request.getfixturevalue(fixture)
    names = {}
    for compiled in (False, True):
        module = make(compile_blocks=compiled, lora=LoraSettings(rank=2, alpha=2))
        module.configure_model()
        assert module.model.compiled is compiled
        assert all(("forward" in vars(b)) is compiled for b in repeated_blocks(module.model.transformer))
        checkpoint = {"state_dict": module.state_dict()}
        TrainedModule.on_save_checkpoint(module, checkpoint)
        names[compiled] = list(checkpoint["state_dict"])
    assert names[True] == names[False]
    assert any("lora_" in name for name in names[True])
