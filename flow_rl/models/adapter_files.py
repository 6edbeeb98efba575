"""Adapters as trainers write them: diffusers, PEFT, kohya and ComfyUI, in one form, or named for what they are.

A LoRA adds `alpha / rank * B @ A` to a weight. Trainers differ in the names of A and B, in what stands before a layer's
name, and in where they keep alpha. Shapes: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

#: name of diffusers for an adapter's weights
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
#: names of an adapter's file in its directory, the preferred one first
FILES = (ADAPTER_FILE, "adapter_model.safetensors")
#: what trainers put before the name of a layer; the longest first
PREFIXES = (
    "base_model.model.transformer.", "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.",
)  # fmt: skip
#: kohya's prefix, after which the dots of a layer's name are underscores
KOHYA = "lora_unet_"
#: parts of a key (with $, its end) that tell a method which is no plain LoRA
OTHER_METHODS = {
    "dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", "lokr_": "a LoKr", "hada_": "a LoHa", "oft_": "an OFT",
    "boft_": "a BOFT", "vera_lambda": "a VeRA", "ia3_": "an (IA)3", "lora_embedding": "a LoRA of embeddings",
    ".diff$": "a full difference of weights", ".diff_b$": "a full difference of biases",
    "lora_mid": "a LoRA of convolutions (Tucker)", "glora": "a GLoRA",
    "norm.set_weight": "a full set of weights",
}  # fmt: skip
_FACTOR = re.compile(
    r"(?P<layer>.+?)\.(?:processor\.)?(?:lora_(?P<kind>A|B|down|up)|lora\.(?P<old>down|up)|(?P<linear>lora_linear_layer)\.(?P<end>down|up))"
    r"(?:\.[\w-]+)?\.(?P<what>weight|bias)"
)
_ALPHA = re.compile(r"(?P<layer>.+?)\.(?:lora_)?alpha")
_DOWN = ("A", "down")
_OF_ENCODERS = ("text_encoder", "lora_te", "te1_", "te2_", "conditioner.", "cond_stage_model.")


@dataclass(frozen=True, kw_only=True)
class LayerFactors:
    """Both factors of one layer's update.

    Attributes:
        down: key of A (R, I) in the file.
        up: key of B (O, R) in the file.
        rank: R.
        inputs: I.
        outputs: O.
        scale: what `B @ A` is multiplied by.
    """

    down: str
    up: str
    rank: int
    inputs: int
    outputs: int
    scale: float


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter: the path itself, or that of its directory.

    Raises:
        ValueError: no safetensors there, several, or a pickle.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    found = [path / name for name in FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) == 1 or (found and found[0].name in FILES):
        return found[0]
    if found:
        listed = ", ".join(f"'{file.name}'" for file in found[:4])
        raise ValueError(f"'{path}' holds several files of weights ({listed}): name the adapter's file itself.")
    pickles = (
        sorted(p for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(kind)) if path.is_dir() else []
    )
    if pickles or path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(
            f"'{pickles[0] if pickles else path}' is a pickle, which could run its author's code. Save the adapter as "
            "safetensors."
        )
    raise ValueError(
        f"No adapter at '{path}': expected a directory with {ADAPTER_FILE} (callbacks.ExportAdapter, diffusers) or "
        f"{FILES[1]} (PEFT), or a .safetensors file."
    )


def read_layers(path: str | Path, layers: Collection[str]) -> dict[str, LayerFactors]:
    """What an adapter adds to which layers. No weights are loaded but its alphas.

    Args:
        path: see `adapter_file`.
        layers: names of the layers that the transformer has, for names whose dots have become underscores.

    Returns:
        Factors by the layer's name in the file's notation without prefixes; it need not be one of `layers`.

    Raises:
        ValueError: a file that can't be read, no LoRA, or one that adapts more than the transformer.
    """
    file = adapter_file(path)
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
            alphas = {key: float(weights.get_tensor(key)) for key, shape in shapes.items() if _is_alpha(key, shape)}
            metadata = weights.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The adapter '{file}' can't be read ({error}): it was cut short, or is no safetensors."
        ) from None
    _refuse_other_methods(file, shapes)
    shapes = _without_copies(shapes)
    names = {name.replace(".", "_"): name for name in layers}
    found: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        if _is_alpha(key, shape):
            continue
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise ValueError(
                f"'{file}' holds no LoRA in a layout that is known here: '{key}' is neither a factor (lora_A, lora_B, "
                "lora_down, lora_up) nor an alpha. Weights that are whole belong in teachers' `path`."
            )
        if match["what"] == "bias" or len(shape) != 2:
            kind = "a LoRA with biases" if match["what"] == "bias" else "a LoRA of convolutions"
            raise ValueError(f"'{file}' is {kind} ('{key}'), and only LoRA of linear layers is read. {_ADVICE}")
        side = "down" if (match["kind"] or match["old"] or match["end"]) in _DOWN else "up"
        found.setdefault(_plain(match["layer"], names), {})[side] = key
    if not found:
        raise ValueError(f"'{file}' holds no adapter: it has no factors at all.")
    scales = _Scales.of(file, metadata, {_plain(_layer_of_alpha(key), names): value for key, value in alphas.items()})
    return {layer: _factors(file, layer, keys, shapes, scales) for layer, keys in sorted(found.items())}


def load_factors(path: str | Path, layers: Mapping[str, LayerFactors]) -> dict[str, Tensor]:
    """The weights in PEFT's notation, the scale in B: `<layer>.lora_A.weight` (R, I), `<layer>.lora_B.weight` (O, R).

    Args:
        path: of the adapter.
        layers: what `read_layers` found.
    """
    factors: dict[str, Tensor] = {}
    with safe_open(adapter_file(path), framework="pt") as weights:
        for layer, known in layers.items():
            up = weights.get_tensor(known.up)
            factors[f"{layer}.lora_A.weight"] = weights.get_tensor(known.down)
            scaled = up if known.scale == 1 else (up.float() * known.scale).to(up.dtype)
            factors[f"{layer}.lora_B.weight"] = scaled
    return factors


_ADVICE = "Merge it into the base with the tool that trained it, and give the merged model in its place (`path`)."


def _refuse_other_methods(file: Path, shapes: Mapping[str, Any]) -> None:
    for key in shapes:
        if key.startswith(_OF_ENCODERS):
            raise ValueError(
                f"'{file}' adapts a text encoder as well ('{key}'), and teachers share the student's. Remove those "
                "keys, or train the adapter on the transformer alone."
            )
        for part, method in OTHER_METHODS.items():
            if key.endswith(part[:-1]) if part.endswith("$") else part in key:
                raise ValueError(f"'{file}' is {method} ('{key}'), and only plain LoRA is read. {_ADVICE}")


def _without_copies(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The keys without those that are there a second time behind `transformer.`: `save_adapter` writes both."""
    return {key: shape for key, shape in shapes.items() if f"transformer.{key}" not in shapes}


def _is_alpha(key: str, shape: list[int]) -> bool:
    return _ALPHA.fullmatch(key) is not None and math.prod(shape) == 1


def _layer_of_alpha(key: str) -> str:
    match = _ALPHA.fullmatch(key)
    assert match is not None
    return match["layer"]


def _plain(layer: str, names: Mapping[str, str]) -> str:
    """A layer's name without what trainers put before it."""
    if layer.startswith(KOHYA):
        rest = layer.removeprefix(KOHYA)
        return names.get(rest) or names.get(rest.removeprefix("transformer_"), rest)
    prefix = next((p for p in PREFIXES if layer.startswith(p)), "")
    return layer.removeprefix(prefix)


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """Where an adapter's alphas stand."""

    by_layer: Mapping[str, float]
    default: float | None
    patterns: Mapping[str, float]
    root: bool

    @classmethod
    def of(cls, file: Path, metadata: Mapping[str, str], by_layer: Mapping[str, float]) -> _Scales:
        """From the file's keys, from diffusers' metadata or from the `adapter_config.json` beside it."""
        config: dict[str, Any] = {}
        said = metadata.get("lora_adapter_metadata")
        beside = file.with_name("adapter_config.json")
        try:
            if said is not None:
                config = {key.removeprefix("transformer."): value for key, value in json.loads(said).items()}
            elif beside.is_file() and not by_layer:
                config = json.loads(beside.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(
                f"The settings of the adapter '{file}' are not JSON ({error}): its alpha is not known."
            ) from None
        if config.get("use_dora"):
            raise ValueError(f"'{file}' is a DoRA by its settings, and only plain LoRA is read. {_ADVICE}")
        if said is None and not beside.is_file() and file.name == FILES[1] and not by_layer:
            raise ValueError(
                f"'{file}' is PEFT's, whose alpha is in adapter_config.json, and there is none beside it. Copy it "
                "there."
            )
        return cls(
            by_layer=by_layer,
            default=config.get("lora_alpha"),
            patterns=config.get("alpha_pattern") or {},
            root=bool(config.get("use_rslora")),
        )

    def scale(self, layer: str, rank: int) -> float:
        """Alpha over rank, or over its root; 1 where nothing is said (as in diffusers)."""
        alpha = self.by_layer.get(layer)
        if alpha is None:
            matching = (v for k, v in self.patterns.items() if re.fullmatch(rf"(.*\.)?({k.removeprefix('^')})", layer))
            alpha = next(matching, self.default)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)


def _factors(
    file: Path, layer: str, keys: Mapping[str, str], shapes: Mapping[str, list[int]], scales: _Scales
) -> LayerFactors:
    if len(keys) != 2:
        raise ValueError(f"'{file}' has one factor of '{layer}' and not the other ('{next(iter(keys.values()))}').")
    (rank, inputs), (outputs, other) = shapes[keys["down"]], shapes[keys["up"]]
    if rank != other:
        raise ValueError(f"'{file}': the factors of '{layer}' have ranks {rank} and {other}, which must be one.")
    scale = scales.scale(layer, rank)
    if not math.isfinite(scale):
        raise ValueError(f"'{file}': the alpha of '{layer}' is not finite.")
    return LayerFactors(down=keys["down"], up=keys["up"], rank=rank, inputs=inputs, outputs=outputs, scale=scale)
