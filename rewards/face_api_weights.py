"""Reads the weight files of face-api.js: a JSON manifest beside one binary file of 8-bit and 32-bit numbers.

Source of the files: npm package ``@vladmandic/face-api`` 1.7.15, folder ``model`` (MIT).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

_WHERE = "It comes in the npm package @vladmandic/face-api, folder model: `npm pack @vladmandic/face-api@1.7.15`."
_BYTES = {"uint8": 1, "float32": 4}
_TYPES = {"uint8": torch.uint8, "float32": torch.float32}


def load_weights(directory: str | Path, name: str) -> dict[str, Tensor]:
    """Read one model.

    Args:
        directory: where ``<name>-weights_manifest.json`` and ``<name>.bin`` are.
        name: the model's name.

    Returns:
        float32 weights by name, in torch's layout: convolutions (out, in, height, width), depthwise ones
        (channels, 1, height, width), matrices (out, in).

    Raises:
        FileNotFoundError: when a file is missing; the message says where to get it.
        ValueError: when the binary file has another length than the manifest says.
    """
    manifest, binary = Path(directory) / f"{name}-weights_manifest.json", Path(directory) / f"{name}.bin"
    for path in (manifest, binary):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. {_WHERE}")
    raw, offset, weights = bytearray(binary.read_bytes()), 0, {}
    for entry in (entry for group in json.loads(manifest.read_text(encoding="utf-8")) for entry in group["weights"]):
        quantization = entry.get("quantization")
        stored = quantization["dtype"] if quantization else entry["dtype"]
        count = math.prod(entry["shape"])
        end = offset + count * _BYTES[stored]
        if end > len(raw):
            raise ValueError(f"{binary} ends at byte {len(raw)}, inside of {entry['name']!r}: fetch it again. {_WHERE}")
        values = torch.frombuffer(raw, dtype=_TYPES[stored], count=count, offset=offset).float()
        if quantization:
            values = values * quantization["scale"] + quantization["min"]
        weights[entry["name"]] = _torch_layout(values.view(entry["shape"]), entry["name"])
        offset = end
    if offset != len(raw):
        raise ValueError(f"{binary} has {len(raw)} bytes, its manifest describes {offset}: fetch both again. {_WHERE}")
    return weights


def _torch_layout(values: Tensor, name: str) -> Tensor:
    if values.ndim == 4:
        order = (2, 3, 0, 1) if name.endswith("depthwise_filter") else (3, 2, 0, 1)
        return values.permute(order).contiguous()
    return values.T.contiguous() if values.ndim == 2 else values.clone()
