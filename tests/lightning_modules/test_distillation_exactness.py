"""What must hold to the last bit, or to float tolerance, inside one distillation step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from flow_rl.batches import Prompts
from flow_rl.distillation.settings import TeacherSettings
from flow_rl.distillation.student_states import States
from flow_rl.flow.guidance import Guidance, guide
from flow_rl.models import load_image_model
from flow_rl.models.adapters import LoraSettings
from lightning_modules import DistillationStudent

TEXTS = ("a portrait of a person with red hair", "a red pot", "a tulip in a blue pot, yellow background")
T2I = Prompts(ids=(11, 12, 13), texts=TEXTS, categories=("portrait", "plant", "plant"))
SOURCES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
EDIT = Prompts(ids=(21, 22, 23), texts=TEXTS, categories=("portrait", "plant", "plant"), sources=SOURCES)
BATCHES = {"t2i": T2I, "edit": EDIT}


def prepared(module: DistillationStudent, batch: Prompts) -> tuple[States, list[torch.Tensor]]:
    module.configure_model()
    module.manual_backward = lambda loss: loss.backward()
    states = module.roll_out(batch)
    return states, module.targets(batch.task, states)


def gradients(module: DistillationStudent, states: States, targets: list[torch.Tensor]) -> list[torch.Tensor]:
    module.zero_grad()
    module.accumulate_gradients(states, targets)
    return [p.grad.clone() for p in module.model.transformer.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("task", "size", "lora"),
    [
        ("t2i", 1, None),
        ("t2i", 5, None),
        ("edit", 5, None),
        ("edit", 64, None),
        ("t2i", 5, LoraSettings(rank=4, alpha=8)),
    ],
)
def test_loss_is_exactly_zero_when_the_student_is_its_teacher_at_guidance_1(
    student, tiny_path, task: str, size: int, lora: LoraSettings | None
) -> None:
    teachers = {task: TeacherSettings(path=tiny_path, guidance=Guidance(scale=1.0))}
    module = student({"micro_batch_size": size}, teachers=teachers, lora=lora)
    states, targets = prepared(module, BATCHES[task])
    metrics = module.accumulate_gradients(states, targets)
    assert metrics["loss"] == 0.0
    assert metrics["gap"] == 0.0
    assert all(not p.grad.any() for p in module.model.transformer.parameters() if p.grad is not None)


def test_loss_is_exactly_zero_for_equal_adapters(student, adapters) -> None:
    """The student's adapter takes on the teacher's values: one transformer plays both."""
    teachers = {"t2i": TeacherSettings(adapter=adapters(5), guidance=Guidance(scale=1.0))}
    module = student(teachers=teachers, lora=LoraSettings(rank=4, alpha=8))
    module.configure_model()
    parameters = dict(module.model.transformer.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                taught = parameters[name.replace(".default.", ".teacher_t2i.")]
                # A teacher's factors hold its scale in B, the student's adapter multiplies by alpha / rank = 2.
                parameter.copy_(taught / 2 if ".lora_B." in name else taught)
    metrics = module.accumulate_gradients(*prepared(module, T2I))
    assert metrics["loss"] == 0.0


def test_loss_is_not_zero_otherwise(student, tiny_path, t2i_teacher) -> None:
    guided = {"t2i": TeacherSettings(path=tiny_path, guidance=Guidance(scale=2.0))}
    other = {"t2i": TeacherSettings(path=t2i_teacher, guidance=Guidance(scale=1.0))}
    for teachers in (guided, other):
        module = student(teachers=teachers)
        assert module.accumulate_gradients(*prepared(module, T2I))["loss"] > 1e-5


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_loss_and_gradient_are_those_of_the_formula(student, t2i_teacher, edit_teacher, task: str) -> None:
    """Against teachers loaded on their own, every state by itself, all in one backward."""
    batch, path = BATCHES[task], {"t2i": t2i_teacher, "edit": edit_teacher}[task]
    module = student()
    states, targets = prepared(module, batch)
    module.zero_grad()
    loss = module.accumulate_gradients(states, targets)["loss"]
    found = [p.grad.clone() for p in module.model.transformer.parameters()]

    teacher, guidance = load_image_model(path, image_size=(32, 32)), module.teachers[task].guidance
    sigmas = module.model.sigmas(4)
    x = module.sampler.initial_noise(module.model, step=0, ids=batch.ids, members=[0, 0, 0])
    expected = torch.zeros(())
    for n in range(4):
        sigma = float(sigmas[n])
        torch.testing.assert_close(states.latents[n], x, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            target = teacher.velocity(x, sigma, teacher.encode(batch.texts, batch.sources))
            if guidance.low < sigma:
                blank = teacher.velocity(x, sigma, teacher.encode([""] * 3, batch.sources))
                target = guide(target, blank, guidance.scale)
        velocity = module.model.velocity(x, sigma, module.model.encode(batch.texts, batch.sources))
        expected = expected + (velocity - target).square().mean() / 4
        x = (x + (sigmas[n + 1] - sigmas[n]) * velocity).detach()
    assert loss == pytest.approx(float(expected), rel=1e-4)
    module.zero_grad()
    expected.backward()
    for one, parameter in zip(found, module.model.transformer.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-9)


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_gradients_do_not_depend_on_the_micro_batch(student, task: str) -> None:
    found = []
    for size in (1, 5, 64):
        module = student({"micro_batch_size": size})
        found.append(gradients(module, *prepared(module, BATCHES[task])))
    assert sum(g.square().sum() for g in found[0]) > 0
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-9)


def test_states_do_not_depend_on_the_rollout_batch(student) -> None:
    one, all_at_once = (prepared(student({"batch_size": size}), T2I)[0].latents for size in (1, 128))
    torch.testing.assert_close(one, all_at_once, rtol=1e-5, atol=1e-5)


def test_few_states_are_some_of_all(student) -> None:
    dense = prepared(student(), T2I)[0]
    module = student({"num_states": 2, "state_bias": -1.0})
    few = prepared(module, T2I)[0]
    index = [dense.sigmas.tolist().index(sigma) for sigma in few.sigmas.tolist()]
    assert len(index) == 2
    torch.testing.assert_close(few.latents, dense.latents[index], rtol=0, atol=0)
    drawn = set()
    for module.iteration in range(30):
        drawn.add(tuple(module.roll_out(T2I).sigmas.tolist()))
    assert len(drawn) > 2


def test_state_weights_scale_each_states_share(student) -> None:
    parts = []
    for weights in ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)):
        module = student({"state_weights": weights})
        parts.append(module.accumulate_gradients(*prepared(module, T2I))["loss"])
    assert parts[0] + parts[1] == pytest.approx(parts[2], rel=1e-5)
    assert min(parts) > 0


def test_nothing_flows_into_teachers_or_states(student, adapters) -> None:
    teachers = {
        "t2i": TeacherSettings(adapter=adapters(5), guidance=Guidance(scale=2.0)),
        "edit": TeacherSettings(path=student().teachers["edit"].path, guidance=Guidance(scale=2.0)),
    }
    for lora in (None, LoraSettings(rank=4, alpha=8)):
        module = student(teachers=teachers, lora=lora)
        module.configure_model()
        trainable = {n for n, p in module.model.transformer.named_parameters() if p.requires_grad}
        for batch in BATCHES.values():
            states, targets = prepared(module, batch)
            assert not states.latents.requires_grad
            assert not any(target.requires_grad for target in targets)
            module.accumulate_gradients(states, targets)
        after = dict(module.model.transformer.named_parameters())
        assert {n for n, p in after.items() if p.requires_grad} == trainable
        assert {n for n, p in after.items() if p.grad is not None and p.grad.any()} <= trainable
        assert all(p.grad is None and not p.requires_grad for p in module.bank.slot.transformer.parameters())
        assert not any("slot" in name or "bank" in name for name in module.state_dict())
        optimized = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
        assert optimized == {id(after[name]) for name in trainable}


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_only_the_teacher_of_the_batchs_task_is_asked(student, task: str) -> None:
    module = student()
    prepared(module, BATCHES[task])
    # Twelve pairs in micro-batches of 5; each holds a noise level at which its teacher is guided.
    guided = 2 * 3
    assert module.bank.calls == Counter({task: guided})
    other = "edit" if task == "t2i" else "t2i"
    assert module.bank.calls[other] == 0


def test_a_batch_without_a_teacher_is_refused(student) -> None:
    module = student(teachers={"t2i": student().teachers["t2i"]})
    module.configure_model()
    with pytest.raises(ValueError, match=r"task 'edit'.*has t2i only"):
        module.roll_out(EDIT)


def test_the_next_rollout_starts_from_other_noise(student) -> None:
    module = student()
    first = prepared(module, T2I)[0].latents[0]
    module.iteration = 1
    assert not torch.allclose(first, module.roll_out(T2I).latents[0])
