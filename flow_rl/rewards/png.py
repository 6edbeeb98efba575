"""PNGs of strangers: what they would unpack to is known, and bounded, before anything is unpacked.

A PNG of a few kilobytes can hold gigabytes, in its pixels or in a text beside them. The header says how many pixels
there are. Of the other chunks only those that make up the picture are read.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: bytes from the signature to the end of the header
HEADER_BYTES = 33
#: chunks that make up an 8-bit RGB picture; the others are notes about it
PICTURE = (b"IHDR", b"IDAT", b"IEND")
#: notes that are compressed
COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")
#: what the notes of a file may unpack to
MAX_NOTE_BYTES = 2**20
#: pixels that are converted at a time
STRIP_PIXELS = 2**18
#: most chunks of a file; encoders cut 62 megapixels into some 25,000
MAX_CHUNKS = 2**17


@dataclass(frozen=True, kw_only=True)
class Header:
    """Size of a PNG in pixels."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Of the whole picture."""
        return self.width * self.height


def read_header(data: bytes, where: str) -> Header:
    """The header of a PNG, from its first 33 bytes or more.

    Raises:
        ValueError: no PNG, or not one of 8 bits a channel in red, green and blue.
    """
    if not data.startswith(SIGNATURE):
        raise ValueError(f"{where} is not a PNG: it begins with {data[:8].hex(' ') or 'nothing'}.")
    if len(data) < HEADER_BYTES or data[12:16] != b"IHDR":
        raise ValueError(f"{where} is not a PNG that can be read: its header is missing or cut off.")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    modes = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
    if colour != 2 or depth != 8:
        raise ValueError(
            f"{where} must be an RGB PNG with 8 bits a channel, received mode '{modes.get(colour, colour)}' with "
            f"{depth} bits: convert it before sending."
        )
    if not (width and height):
        raise ValueError(f"{where} is a PNG of {width} x {height} pixels.")
    return Header(width=width, height=height)


def read_pixels(data: bytes, where: str) -> Tensor:
    """The pixels of a PNG whose header was checked.

    Returns:
        uint8, shape (3, H, W).

    Raises:
        ValueError: a damaged file, or notes that unpack to more than a mebibyte.
    """
    try:
        with Image.open(io.BytesIO(_picture_alone(data, where)), formats=["PNG"]) as image:
            return _unpacked(image)
    except UnidentifiedImageError:
        raise ValueError(f"{where} is not a PNG that can be read.") from None
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where} is damaged: {message}") from None


def _unpacked(image: Image.Image) -> Tensor:
    """Pixels, strip by strip: Pillow's own conversion holds the picture three times."""
    image.load()
    width, height = image.size
    pixels = torch.empty((3, height, width), dtype=torch.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = np.array(image.crop((0, top, width, min(top + rows, height))))
        pixels[:, top : top + rows] = torch.from_numpy(strip).permute(2, 0, 1)
    return pixels


def _picture_alone(data: bytes, where: str) -> bytes:
    """The file without its notes."""
    kept, left = [SIGNATURE], MAX_NOTE_BYTES
    for kind, begin, end in _chunks(data, where):
        if kind in PICTURE:
            kept.append(data[begin - 8 : end + 4])
        elif kind in COMPRESSED:
            left -= _unpacked_bytes(kind, data[begin:end], left + 1)
            if left < 0:
                raise ValueError(
                    f"{where} has a {kind.decode()} chunk (a note beside the pixels) that unpacks to more than "
                    f"{MAX_NOTE_BYTES / 2**20:g} MiB: remove such notes before sending."
                )
    return b"".join(kept)


def _chunks(data: bytes, where: str) -> Iterator[tuple[bytes, int, int]]:
    """Kind of every chunk, and where its data begins and ends."""
    place, count = len(SIGNATURE), 0
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 8 + length
        count += 1
        if count > MAX_CHUNKS:
            raise ValueError(f"{where} has more than {MAX_CHUNKS} chunks.")
        yield kind, place + 8, min(end, len(data))
        if kind == b"IEND":
            return
        place = end + 4
    # What is cut off is told by the decoder, which knows whether pixels are missing.


def _unpacked_bytes(kind: bytes, note: bytes, most: int) -> int:
    """Size of a compressed note once unpacked, up to `most`; a damaged one is thrown away like any other."""
    _, _, rest = note.partition(b"\0")
    if kind == b"iTXt":  # flag, method, language, translated keyword
        if not rest.startswith(b"\1"):
            return 0
        packed = b"".join(rest[2:].split(b"\0", 2)[2:])
    else:
        packed = rest[1:]
    try:
        return len(zlib.decompressobj().decompress(packed, most))
    except zlib.error:
        return 0
