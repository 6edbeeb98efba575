"""Adapters: float32 masters, computation in the dtype of the base, and the same values wherever the model lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flow_rl.models import ImageModel, load_image_model
from flow_rl.models.adapters import adapted_layers, add_lora, load_frozen_adapter, save_adapter, use_adapter
from flow_rl.models.memory import WeightDtypes

TEXTS = ("a red pot", "a tulip in a blue pot")
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}
SCALE = 2.0


@pytest.fixture
def adapted(tiny_path: str) -> Callable[..., ImageModel]:
    """`adapted("bfloat16")`: the tiny generator on a base of that dtype, its adapter far from zero."""

    def make(frozen_dtype: str, **changes) -> ImageModel:
        dtypes = WeightDtypes.kept(frozen_dtype, adapter=True)
        model = load_image_model(tiny_path, image_size=(32, 32), dtypes=dtypes)
        add_lora(model.transformer, **LORA | changes, targets=model.lora_targets)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in masters(model).values():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
        return model

    return make


def masters(model: ImageModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.transformer.named_parameters() if ".lora_" in name}


def velocity(model: ImageModel) -> Tensor:
    latents = torch.randn(2, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    return model.velocity(latents, torch.tensor([0.9, 0.4]), model.encode(TEXTS))


def a_layer(model: ImageModel) -> tuple[nn.Module, Tensor]:
    """An adapted layer, and an input in its base's dtype."""
    layer = dict(adapted_layers(model.transformer))["transformer_blocks.0.img_mlp.out"]
    weight = layer.get_base_layer().weight
    return layer, torch.randn(15, weight.shape[1], generator=torch.Generator().manual_seed(2)).to(weight.dtype)


def test_an_adapter_on_a_bfloat16_base_computes_in_bfloat16(adapted) -> None:
    layer, inputs = a_layer(adapted("bfloat16"))
    down, up = (f["default"].weight for f in (layer.lora_A, layer.lora_B))
    assert down.dtype == up.dtype == torch.float32
    assert layer.get_base_layer().bias is None
    base = functional.linear(inputs, layer.get_base_layer().weight)
    hidden = functional.linear(inputs, down.bfloat16())
    assert torch.equal(layer(inputs), base + functional.linear(hidden, up.bfloat16()) * SCALE)
    exact = inputs.double() @ (layer.get_base_layer().weight.double() + SCALE * up.double() @ down.double()).T
    assert relative(layer(inputs), exact) < 0.01


def test_gradients_land_on_the_masters_in_float32(adapted) -> None:
    """Against the closed form in float64."""
    layer, inputs = a_layer(adapted("bfloat16"))
    down, up = (f["default"].weight for f in (layer.lora_A, layer.lora_B))
    arriving = torch.randn(layer(inputs).shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    layer(inputs).backward(arriving)
    x, g = inputs.double(), arriving.double()
    assert down.grad.dtype == up.grad.dtype == torch.float32
    assert relative(up.grad, SCALE * g.T @ (x @ down.double().T)) < 0.01
    assert relative(down.grad, SCALE * (g @ up.double()).T @ x) < 0.01


def relative(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())


def test_gradients_of_the_whole_model_are_close_to_those_of_float32(adapted) -> None:
    coarse, exact = adapted("bfloat16"), adapted("float32")
    with torch.no_grad():
        exact.transformer.load_state_dict(coarse.transformer.state_dict())
    gradients = []
    for model in (coarse, exact):
        velocity(model).square().mean().backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        gradients.append(torch.cat([p.grad.flatten() for p in masters(model).values()]))
    assert functional.cosine_similarity(*gradients, dim=0) > 0.95


def test_small_updates_of_a_master_are_not_rounded_away(adapted) -> None:
    model = adapted("bfloat16")
    optimizer = torch.optim.AdamW(masters(model).values(), lr=1e-6, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in masters(model).items()}
    velocity(model).square().mean().backward()
    optimizer.step()
    for name, master in masters(model).items():
        moved = master.detach() != before[name]
        assert moved.float().mean() > 0.9, name
        assert (master.bfloat16() == before[name].bfloat16()).float().mean() > 0.9, "in bfloat16 hardly any would move"


def test_autograd_keeps_no_activation_of_an_adapter_in_float32(adapted) -> None:
    layer, inputs = a_layer(adapted("bfloat16"))
    kept = [(tuple(t.shape), t.dtype) for t in saved(lambda: layer(inputs.requires_grad_()))]
    rows, (out, into) = inputs.shape[0], layer.get_base_layer().weight.shape
    activations = {shape: dtype for shape, dtype in kept if shape[0] == rows}
    assert activations == {(rows, into): torch.bfloat16, (rows, LORA["rank"]): torch.bfloat16}
    assert (rows, out) not in activations, "the wide output is not needed again"
    assert {dtype for _, dtype in kept} == {torch.bfloat16}


def saved(forward: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps of a forward for its backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        forward()
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_on_a_float32_base_nothing_differs_from_peft_bit_for_bit(adapted, dropout: float) -> None:
    model = adapted("float32", dropout=dropout)
    model.transformer.train()
    plain = deepcopy(model)
    for layer in as_peft_made_them(plain):
        assert layer.cast_input_dtype_enabled
    results = []
    for each in (model, plain):
        torch.manual_seed(3)
        out = velocity(each)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in masters(each).values())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def as_peft_made_them(model: ImageModel) -> Iterator[nn.Module]:
    for _, layer in adapted_layers(model.transformer):
        layer.cast_input_dtype_enabled = True
        for factors in (layer.lora_A, layer.lora_B):
            factor = factors["default"]
            factors["default"] = nn.Linear(factor.in_features, factor.out_features, bias=False)
            factors["default"].weight = factor.weight
        yield layer


def test_recomputed_activations_change_no_bit(adapted) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted("bfloat16")
        model.transformer.train()
        if checkpointing:
            model.transformer.enable_gradient_checkpointing()
        velocity(model).square().mean().backward()
        gradients.append([p.grad for p in masters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
def test_a_frozen_adapter_computes_as_the_masters_that_it_was_saved_from(adapted, tmp_path, frozen_dtype: str) -> None:
    model = adapted(frozen_dtype)
    save_adapter(model.transformer, tmp_path)
    with torch.no_grad():
        expected = velocity(model)
        load_frozen_adapter(model.transformer, tmp_path, "teacher")
        assert torch.equal(velocity(model), expected), "loading switches to no other adapter"
        for name, weight in model.transformer.named_parameters():
            if ".teacher." in name:
                assert not weight.requires_grad
                assert weight.dtype == model.transformer.dtype
                weight_saved = dict(model.transformer.named_parameters())[name.replace(".teacher.", ".default.")]
                assert weight_saved.dtype == torch.float32
                assert weight_saved.requires_grad
        use_adapter(model.transformer, "teacher")
        assert torch.equal(velocity(model), expected)


class DefaultDevice(TorchFunctionMode):
    """Counts the tensors that are made wherever the default device is, such as a GPU with random numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.made += func is torch.empty and (kwargs or {}).get("device") is None
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("place", ["float32", "bfloat16", "no memory yet"])
def test_a_seed_gives_one_adapter_wherever_the_model_lives(tiny_path: str, place: str) -> None:
    """The values are those of plain peft on a float32 model in CPU memory."""
    reference = load_image_model(tiny_path, image_size=(32, 32))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(reference.lora_targets))
    torch.manual_seed(5)
    with DefaultDevice() as plain:
        reference.transformer.add_adapter(config)
    assert plain.made, "peft alone takes the default device"

    dtypes = WeightDtypes.kept("bfloat16" if place == "bfloat16" else "float32", adapter=True)
    model = load_image_model(tiny_path, image_size=(32, 32), dtypes=dtypes, empty=place == "no memory yet")
    torch.manual_seed(5)
    with DefaultDevice() as elsewhere:
        add_lora(model.transformer, **LORA, targets=model.lora_targets)
    assert elsewhere.made == 0
    expected = masters(reference)
    assert expected.keys() == masters(model).keys()
    for name, master in masters(model).items():
        assert master.dtype == torch.float32
        assert master.device.type == "cpu"
        assert torch.equal(master, expected[name]), name


def test_a_planned_adapter_takes_no_memory(tiny_path: str) -> None:
    model = load_image_model(tiny_path, image_size=(32, 32), empty=True)
    with torch.device("meta"):
        add_lora(model.transformer, **LORA, targets=model.lora_targets)
    assert masters(model)
    assert all(weight.is_meta for weight in masters(model).values())
