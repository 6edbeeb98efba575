"""Content hashes: whether numbers on disk were made by the same files, weights and settings.

A hash of a value covers what it holds, not where it lives: paths count by their files' content, tensors by their
bytes, networks by their weights, our own objects by their public attributes.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: hexadecimal digits of a hash that are kept: 64 bits
DIGITS = 16
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def digest(value: Any) -> str:
    """Hash of a value.

    Plain values, mappings, sequences, paths, tensors, networks and objects of our own code count by their content;
    objects of other libraries by their class alone, since their insides change as they are used; devices not at all.

    Args:
        value: anything; an object with a method `fingerprint` says itself what it counts as.

    Returns:
        16 hexadecimal digits.
    """
    found = hashlib.sha256()
    _feed(found, value, set())
    return found.hexdigest()[:DIGITS]


def attributes_digest(value: object, *, skip: Collection[str] = ()) -> str:
    """Hash of an object's class and attributes; of private ones only networks and tensors count.

    Args:
        value: an object of our own or a user's code.
        skip: names of attributes that change no result, such as a time limit.
    """
    found = hashlib.sha256()
    _feed_attributes(found, value, set(), skip)
    return found.hexdigest()[:DIGITS]


def digest_file(path: Path) -> str:
    """Hash of a file's bytes, 16 hexadecimal digits."""
    return _file_hash(path)[:DIGITS]


def digest_directory(path: str | Path) -> str:
    """Hash of the files below a directory: their relative names and their content; hidden ones are left out.

    Raises:
        ValueError: not a directory, or one without files.
    """
    root = Path(path)
    files = sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root)))
    if not files:
        raise ValueError(f"'{path}' is no directory with files, so there is nothing to recognise a model by.")
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(root).as_posix()}\0{_file_hash(file)}\0".encode())
    return found.hexdigest()[:DIGITS]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _feed(found: hashlib._Hash, value: Any, above: set[int]) -> None:
    """Add a value to the hash, headed by its kind, so that 1, "1" and [1] differ."""
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        found.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, (torch.dtype, type)):
        found.update(f"name:{value!r};".encode())
    elif isinstance(value, torch.device):
        pass
    elif isinstance(value, Path):
        found.update(f"file:{_file_hash(value) if value.is_file() else value.name};".encode())
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        found.update(f"tensor:{flat.dtype}{tuple(flat.shape)}:".encode())
        found.update(flat.view(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif id(value) in above:
        found.update(b"above;")
    else:
        _feed_container(found, value, above | {id(value)})


def _feed_container(found: hashlib._Hash, value: Any, above: set[int]) -> None:
    if callable(getattr(value, "fingerprint", None)):
        found.update(f"own:{value.fingerprint()};".encode())
    elif isinstance(value, nn.Module):
        found.update(f"network:{_class_name(value)};".encode())
        _feed(found, dict(value.state_dict()), above)
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)}:".encode())
        for key in sorted(value, key=repr):
            _feed(found, key, above)
            _feed(found, value[key], above)
    elif isinstance(value, Sequence):
        found.update(f"sequence {len(value)}:".encode())
        for item in value:
            _feed(found, item, above)
    elif isinstance(value, Set):
        _feed(found, sorted(value, key=repr), above)
    elif _foreign(type(value)):
        found.update(f"class:{_class_name(value)};".encode())
    else:
        _feed_attributes(found, value, above, ())


def _feed_attributes(found: hashlib._Hash, value: object, above: set[int], skip: Collection[str]) -> None:
    found.update(f"object:{_class_name(value)};".encode())
    attributes = getattr(value, "__dict__", {})
    for name in sorted(attributes):
        held = attributes[name]
        if name in skip or (name.startswith("_") and not isinstance(held, (nn.Module, Tensor))):
            continue
        found.update(f".{name}=".encode())
        _feed(found, held, above | {id(value)})


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _foreign(kind: type) -> bool:
    """Tell whether a class comes with Python or an installed library."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return file is None or file.startswith(_LIBRARIES)
