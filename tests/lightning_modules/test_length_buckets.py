"""Parts of similar length: the loss and the gradient of the whole batch, with less padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from datamodules.annotation_files import AnnotationBatch
from datamodules.preferences import PreferenceBatch
from flow_rl.rewards.finetune_settings import RewardObjective
from lightning_modules.length_buckets import mean_of_parts, parts_by_length, split_by_length
from tests.toy_vlm import toy_data, toy_module, toy_trainer


def test_parts_are_sorted_whole_and_as_equal_as_can_be() -> None:
    parts = split_by_length([5.0, 1.0, 4.0, 1.0, 3.0, 9.0, 2.0], 3)
    assert parts == [[1, 3], [6, 4], [2, 0, 5]]
    assert split_by_length([2.0, 1.0], 1) == [[1, 0]]
    assert split_by_length([2.0, 1.0], 2) == [[1], [0]]


def _batch(kind: str) -> AnnotationBatch | PreferenceBatch:
    """Seven images or pairs whose prompts differ a lot in length."""
    examples = next(iter(toy_data().train_dataloader())).examples
    assert len(examples) >= 7
    long = [
        replace(e, annotation=replace(e.annotation, prompt=" ".join(["a bright image"] * (1 + 5 * i % 7))))
        for i, e in enumerate(examples[:7])
    ]
    if kind == "pointwise":
        return AnnotationBatch(examples=tuple(long))
    return PreferenceBatch(chosen=tuple(long), rejected=tuple(reversed(long)))


@pytest.mark.parametrize("kind", ["pointwise", "pairwise"])
def test_loss_and_gradient_do_not_depend_on_the_parts(kind: str) -> None:
    module = toy_module(objective=RewardObjective(kind=kind, direct_share=0.5))
    module.configure_model()
    batch, direct = _batch(kind), [True, False, False, True, False, False, True]
    found = []
    for count in (1, 3, 7):
        parts = parts_by_length(batch, module.rubrics, direct, count)
        loss, metrics = mean_of_parts([module.loss(*part) for part in parts], [len(part) for part, _ in parts])
        module.model.zero_grad()
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])
        found.append((loss.detach(), metrics, gradients))
    whole = found[0]
    for loss, metrics, gradients in found[1:]:
        torch.testing.assert_close(loss, whole[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, whole[2], rtol=1e-3, atol=1e-5)
        for name, value in whole[1].items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-6)


def test_short_questions_are_padded_less() -> None:
    module = toy_module()
    batch = _batch("pointwise")
    parts = parts_by_length(batch, module.rubrics, [False] * 7, 3)
    longest = [max(len(e.annotation.prompt) for e in part.examples) for part, _ in parts]
    assert longest == sorted(longest)
    assert longest[0] < longest[-1]


def test_more_parts_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"length_parts is 99.*at most"):
        toy_trainer(1).fit(toy_module(length_parts=99), toy_data())
    with pytest.raises(ValueError, match="length_parts"):
        toy_module(length_parts=0)
