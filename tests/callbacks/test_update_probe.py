"""The probe on a policy whose right way is known, and that training does not notice it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import UpdateProbe
from callbacks.update_probe import spread
from datamodules.prompts import FixedBatches
from flow_rl.monitoring.update_direction import Probe, stepped
from flow_rl.rewards import Samples
from tests.planted import Brightness


class Constant(Brightness):
    def score(self, samples: Samples) -> Tensor:
        return torch.full((len(samples),), 3.0)


class LastStep(Callback):
    """Which random number would come next, and the gradients, right after each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *args, **kwargs) -> None:
        grads = [p.grad.flatten() for p in pl_module.model.transformer.parameters() if p.grad is not None]
        with torch.random.fork_rng(devices=[]):
            self.seen.append(torch.cat([torch.rand(3), *grads]))


def fit(policy, data, directory: Path, *callbacks: Callback, steps: int = 2, **changes) -> tuple[object, Trainer]:
    module = policy(
        "clipped",
        rollout={"num_steps": 3, "shared_noise": True, "group_size": 4},
        optimizer=partial(torch.optim.SGD, lr=0.05),
        **changes,
    )
    run = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=TensorBoardLogger(directory, name="", version="", default_hp_metric=False),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    run.fit(module, data())
    return module, run


def logged(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory)).Reload()


def test_training_does_not_notice_the_probe(policy, data, tmp_path) -> None:
    found = []
    for name, probes in (("with", [UpdateProbe(every=1, prompts=3)]), ("without", [])):
        torch.manual_seed(0)
        watch = LastStep()
        module, _ = fit(policy, data, tmp_path / name, *probes, watch, objective={"updates": 1})
        weights = [p.detach().clone() for p in module.model.transformer.parameters()]
        found.append((weights, watch.seen, module.model.transformer.training))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)
    assert found[0][2] == found[1][2]
    scalars = logged(tmp_path / "with")
    for key in ("before", "after", "slope", "error"):
        assert len(scalars.Scalars(f"probe/{key}")) == 2
    before, after, slope = (scalars.Scalars(f"probe/{key}")[0].value for key in ("before", "after", "slope"))
    assert slope == pytest.approx((after - before) / 0.1, abs=1e-4)
    assert "time/probe_s" not in scalars.Tags()["scalars"]  # no timer asked for


def scripted(monkeypatch, *rises: float) -> None:
    """Probes that find these rises, one after the other, each far beyond chance."""
    left = list(rises)

    def probe(_module, held_out, *, step_size: float) -> Probe:
        before = torch.full((sum(len(prompts) for prompts in held_out),), 3.0)
        return Probe(before=before, after=before + left.pop(0), step_size=step_size)

    monkeypatch.setattr("callbacks.update_probe.probe_gradient", probe)


def test_updates_that_lead_down_are_an_alert_and_can_stop(policy, data, tmp_path, monkeypatch, caplog) -> None:
    scripted(monkeypatch, -0.1, 0.1, -0.1, -0.2, -0.3)
    probe = UpdateProbe(every=1, step_size=0.5, prompts=4, patience=2, stop=True)
    with caplog.at_level(logging.WARNING):
        _, run = fit(policy, data, tmp_path, probe, steps=6)
    assert run.global_step == 4  # the first two downhill in a row are the third and fourth
    assert probe.state_dict() == {"downhill": 2}
    alerts = [record.message for record in caplog.records if "points the wrong way" in record.message]
    assert len(alerts) == 1
    assert "4 held-out prompts goes from 3.000 to 2.800" in alerts[0]
    events = logged(tmp_path)
    assert "probe/alert/text_summary" in events.Tags()["tensors"]
    assert [e.value for e in events.Scalars("probe/slope")] == pytest.approx([-0.2, 0.2, -0.2, -0.4], rel=1e-5)


def test_probes_come_every_so_many_iterations_and_an_alert_alone_stops_nothing(
    policy, data, tmp_path, monkeypatch
) -> None:
    scripted(monkeypatch, -0.1, -0.1)
    probe = UpdateProbe(every=2, prompts=4, patience=1)
    _, run = fit(policy, data, tmp_path, probe, steps=6, objective={"updates": 2})  # three iterations
    assert run.global_step == 6
    assert len(logged(tmp_path).Scalars("probe/slope")) == 2  # the first update of iterations 0 and 2


def test_without_a_gradient_there_is_no_direction(policy, data, tmp_path) -> None:
    fit(policy, data, tmp_path, UpdateProbe(every=1, prompts=2), steps=1, rewards={"constant": Constant()})
    assert not [key for key in logged(tmp_path).Tags()["scalars"] if key.startswith("probe/")]


def test_a_step_has_its_length_and_leaves_no_trace() -> None:
    layer = torch.nn.Linear(3, 2)
    layer(torch.randn(4, 3)).square().sum().backward()
    start, gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
    with stepped(layer.parameters(), 0.3) as moved:
        assert moved
        change = layer.weight.detach() - start
        bias = 0.3 * layer.bias.grad / torch.cat([gradient.flatten(), layer.bias.grad]).norm()
        assert float(change.square().sum() + bias.square().sum()) == pytest.approx(0.09, rel=1e-4)
        assert float((change * gradient).sum()) < 0
    assert torch.equal(layer.weight, start)
    assert torch.equal(layer.weight.grad, gradient)


def test_chance_is_told_from_a_wrong_way() -> None:
    before = torch.zeros(4)
    nan = float("nan")
    clear = Probe(before=before, after=torch.tensor([-0.1, -0.12, -0.09, -0.11]), step_size=0.1)
    chance = Probe(before=before, after=torch.tensor([-0.5, 0.4, -0.3, 0.3]), step_size=0.1)
    masked = Probe(before=before, after=torch.tensor([nan, -0.1, -0.2, -0.15]), step_size=0.1)
    assert (clear.not_uphill, chance.not_uphill, masked.not_uphill) == (True, False, True)
    assert clear.slope == pytest.approx(-1.05)
    assert masked.rise == pytest.approx(-0.15)
    # By hand: deviation 0.05 over three prompts.
    assert masked.error == pytest.approx(0.05 / 3**0.5, rel=1e-5)


def test_prompts_are_spread_over_the_validation_set(data) -> None:
    table = data().train
    chosen = spread(FixedBatches(table, 5), 4)
    ids = [i for batch in chosen for i in batch.ids]
    assert len(ids) == 4
    assert len(set(ids)) == 4
    assert ids[0] < 4 <= ids[-1]
    assert [i for batch in spread(FixedBatches(table, 5), 99) for i in batch.ids] == list(table.ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"every": 0}, "every is 0"), ({"prompts": 1}, "prompts is 1"), ({"step_size": 0.0}, "above 0")],
)
def test_bad_settings_are_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateProbe(**arguments)
