"""PNGs as a stranger makes them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def png(mode: str = "RGB", size: tuple[int, int] = (2, 2), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A good picture with one more chunk after its header."""
    plain = png()
    return plain[:33] + chunk(kind, data) + plain[33:]


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
