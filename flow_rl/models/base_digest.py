"""Recognise the weights of a saved model by their content, without reading all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import uint8

#: components of a pipeline whose weights an image depends on
COMPONENTS = ("transformer", "text_encoder", "vae")
#: what a reader of weights calls a model without components
WHOLE = "model"
_DIGITS = 16
#: entries of a config that say nothing of what the component computes
_VOLATILE = {"transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path", "_diffusers_version"}


def base_digests(directory: str | Path) -> dict[str, str]:
    """A digest of each component of a model that diffusers saved, or of all of one that transformers saved.

    Of every tensor it takes name, shape, dtype and three rows (the first, the middle and the last): training moves all
    of them. A model of 20 billion weights takes seconds.

    Args:
        directory: what `save_pretrained` wrote.

    Returns:
        Hexadecimal digests by component; those without weights on this machine are left out.

    Raises:
        ValueError: a file of weights that can't be read.
    """
    directory = Path(directory)
    if (directory / "model_index.json").is_file():
        found = {name: _digest(directory / name) for name in COMPONENTS if (directory / name).is_dir()}
    else:
        found = {WHOLE: _digest(directory)}
    return {name: digest for name, digest in found.items() if digest is not None}


def _digest(directory: Path) -> str | None:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        return None
    known: dict[str, bytes] = {}
    for file in files:
        known |= _rows(file)
    digest = hashlib.sha256(_config(directory / "config.json"))
    for name in sorted(known):  # however the tensors are spread over files
        digest.update(name.encode() + b"\0" + known[name])
    return digest.hexdigest()[:_DIGITS]


def _rows(file: Path) -> dict[str, bytes]:
    found = {}
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a mapping)
                tensor = weights.get_slice(name)
                shape = tensor.get_shape()
                count = shape[0] if shape else 0
                places: Iterable[int] = {0, count // 2, count - 1} if count else ()
                parts = [tensor[row : row + 1] for row in sorted(places)] if shape else [weights.get_tensor(name)]
                head = f"{shape} {tensor.get_dtype()} ".encode()
                found[name] = head + b"".join(
                    part.contiguous().view(-1).view(uint8).numpy().tobytes() for part in parts if part.numel()
                )
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{file}' can't be read ({error}): the model's weights are incomplete. Copy it again."
        ) from None
    return found


def _config(path: Path) -> bytes:
    if not path.is_file():
        return b""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in _VOLATILE}
    return json.dumps(kept, sort_keys=True).encode()
