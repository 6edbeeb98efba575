"""KL to the weights before training, and step weights, against their formulas written out."""

from __future__ import annotations

import pytest
import torch

from flow_rl.batches import Prompts
from flow_rl.models import load_image_model
from flow_rl.models.adapters import LoraSettings
from flow_rl.rl.objectives import Pairs, Rollout
from flow_rl.rl.shadow_weights import AdapterOff, ShadowWeights
from lightning_modules import GRPOPolicy

BATCH = Prompts(ids=(11, 12), texts=("a tulip in a blue pot", "a red pot"), categories=("plant", "plant"))
LORA = LoraSettings(rank=4, alpha=8)


def made(module: GRPOPolicy) -> tuple[GRPOPolicy, Rollout]:
    module.configure_model()
    module.model.transformer.train()
    module.manual_backward = lambda loss: loss.backward()
    return module, module.roll_out(BATCH)


def move(module: GRPOPolicy) -> None:
    """Away from the start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.model.transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def expected_kl(module: GRPOPolicy, rollout: Rollout) -> float:
    """For flow_sde: mean - mean_ref = (1 + s^2 (1 - sigma) / (2 sigma)) dt (v - v_ref), over 2 s^2."""
    base = load_image_model(module.model_path, image_size=(32, 32))
    found = []
    for k, index in enumerate(rollout.trajectory.steps):
        sigma, sigma_next = float(rollout.sigmas[index]), float(rollout.sigmas[index + 1])
        s_squared = 0.7**2 * sigma / (1 - (float(rollout.sigmas[1]) if sigma == 1 else sigma))
        x = rollout.trajectory.states[k]
        with torch.no_grad():
            v = module.model.velocity(x, sigma, rollout.conditioning).double()
            v_ref = base.velocity(x, sigma, rollout.conditioning).double()
        factor = (1 + s_squared * (1 - sigma) / (2 * sigma)) * (sigma_next - sigma)
        found.append((factor * (v - v_ref)).square().mean() / (2 * s_squared))
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_kl_is_that_of_the_transitions(policy, lora) -> None:
    module, rollout = made(policy("clipped", objective={"kl_weight": 0.5, "updates": 2}, lora=lora))
    assert isinstance(module.reference, AdapterOff if lora else ShadowWeights)
    start = module.accumulate_gradients(rollout, torch.zeros(6), module.prepare(rollout, 0))
    assert float(start["kl"]) == 0.0
    move(module)
    prepared = module.prepare(rollout, 0)
    assert prepared.keys() == {"log_prob", "mean", "mean_reference"}
    module.zero_grad()
    metrics = module.accumulate_gradients(rollout, torch.zeros(6), prepared)
    assert float(metrics["kl"]) == pytest.approx(expected_kl(module, rollout), rel=1e-3)
    # Without advantages the KL is all there is of the loss, and its gradient leads back.
    assert float(metrics["loss"]) == pytest.approx(0.5 * float(metrics["kl"]), rel=1e-4)
    trainable = [p for p in module.model.transformer.parameters() if p.requires_grad]
    length = torch.sqrt(sum(p.grad.square().sum() for p in trainable if p.grad is not None))
    with torch.no_grad():
        for p in trainable:
            if p.grad is not None:
                p.sub_(p.grad * (0.05 / length))
    closer = module.accumulate_gradients(rollout, torch.zeros(6), prepared)
    assert float(closer["kl"]) < float(metrics["kl"])


def test_the_adapter_is_back_on_and_trainable_after_an_error(policy) -> None:
    module, rollout = made(policy("clipped", objective={"kl_weight": 0.1}, lora=LORA))
    move(module)
    trainable = [name for name, p in module.model.transformer.named_parameters() if p.requires_grad]
    x, sigma = rollout.trajectory.states[0], 0.5
    with torch.no_grad():
        adapted = module.model.velocity(x, sigma, rollout.conditioning)
        seen: list[torch.Tensor] = []

        def fail_inside() -> None:
            with module.reference.applied():
                seen.append(module.model.velocity(x, sigma, rollout.conditioning))
                raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"):
            fail_inside()
        again = module.model.velocity(x, sigma, rollout.conditioning)
    assert torch.equal(adapted, again)
    assert (adapted - seen[0]).abs().max() > 1e-4
    assert trainable == [name for name, p in module.model.transformer.named_parameters() if p.requires_grad]


def test_steps_weigh_by_the_noise_they_add(policy) -> None:
    module, rollout = made(policy("clipped", objective={"step_weights": "noise"}))
    sigmas, noise = rollout.sigmas.tolist(), []
    for index in rollout.trajectory.steps:
        s = 0.7 * (sigmas[index] / (1 - (sigmas[1] if index == 0 else sigmas[index]))) ** 0.5
        noise.append(s * (sigmas[index] - sigmas[index + 1]) ** 0.5)
    for k in range(2):
        pair = Pairs(sample=torch.tensor([1]), step=torch.tensor([k]), samples=(1,), steps=(k,))
        loss, _ = module.objective.loss(module.model, rollout, torch.full((6,), 2.0), pair, {}, denominator=1)
        # At ratio 1 a row's loss is -A times its weight.
        assert float(loss) == pytest.approx(-2.0 * noise[k] / (sum(noise) / 2), rel=1e-5)
