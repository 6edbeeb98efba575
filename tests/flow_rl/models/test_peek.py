"""What is read of a model directory without loading its weights."""

from __future__ import annotations

import pytest
import torch

from flow_rl.models.loading import peek_grid, peek_sigmas


@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_peeked_schedule_is_the_models(num_steps, tiny_pipeline, tiny_model, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "base")
    peeked = peek_sigmas(tmp_path / "base", num_steps, image_size=(32, 48))
    torch.testing.assert_close(peeked, tiny_model.sigmas(num_steps, size=(32, 48)), rtol=0, atol=0)


def test_peeked_schedule_sees_a_shift_by_resolution(tiny_pipeline, tiny_model, monkeypatch, tmp_path):
    dynamic = type(tiny_pipeline.scheduler)(use_dynamic_shifting=True)
    monkeypatch.setattr(tiny_pipeline, "scheduler", dynamic)
    tiny_pipeline.save_pretrained(tmp_path / "base")
    small, large = (peek_sigmas(tmp_path / "base", 4, image_size=(side, side)) for side in (32, 512))
    assert not torch.equal(small, large)
    torch.testing.assert_close(large, tiny_model.sigmas(4, size=(512, 512)), rtol=0, atol=0)


def test_incomplete_directories_are_refused(tiny_pipeline, tmp_path):
    path = tmp_path / "base"
    tiny_pipeline.save_pretrained(path)
    assert peek_grid(path, (32, 48)) == (4, 6)
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        peek_grid(path, (32, 40))
    (path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="no scheduler/scheduler_config"):
        peek_sigmas(path, 4, image_size=(32, 32))
    (path / "vae" / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"config\.json', line 1: not JSON"):
        peek_grid(path, (32, 32))
    (path / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match="no vae/config"):
        peek_grid(path, (32, 32))
