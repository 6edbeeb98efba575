"""The one reader of pictures: the pixels that a viewer shows, as 8-bit sRGB, or a refusal.

The reader applies what a file says beside its pixels: orientation (EXIF), palette, transparency and embedded colour
profile. Transparent parts are shown on white. 16-bit greys are rounded to 8 bits. The reader refuses what has no single
meaning as a picture: animations, several pages, floating-point and 32-bit integer pixels. It ignores a PNG's gamma.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from flow_rl.file_kinds import kind_of

#: of what this reader makes of a file; raise it whenever other pixels come out, so that no cache outlives a change
READER_VERSION = 1
#: pixels of one picture, Pillow's own limit: more is taken for a decompression bomb
MAX_PIXELS = 89_478_485
#: bytes of one file
MAX_BYTES = 1 << 29
#: formats that are read, by the names that Pillow gives them; no other decoder is ever called. JPEG stands for MPO, too
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
#: formats whose further frames are no animation: other views or a preview of the same photo
_ONE_PHOTO = ("MPO",)
#: how a viewer turns a picture, by the value of the EXIF tag `Orientation`
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
#: text chunks of a PNG that say how to show it; all others are notes, such as a ComfyUI workflow of megabytes
_SHOWN_TEXT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
#: what `kind_of` calls pictures that are read where they are whole
_PICTURES = ("a PNG picture", "a JPEG picture", "a GIF picture", "a WebP picture")
#: modes of pixels that have one meaning; 16-bit greys beside them
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
#: modes of pixels, by the colour space that an embedded profile for them has
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB = ImageCms.createProfile("sRGB")


class PictureError(ValueError):
    """A picture that cannot be read; the message names it and says why."""


def read_picture(path: str | Path) -> Image.Image:
    """A picture file as a viewer shows it.

    Args:
        path: of the file, whose suffix does not matter.

    Returns:
        An image of mode RGB.

    Raises:
        PictureError: no such file, one that cannot be opened, or see `decode_picture`.
    """
    return decode_picture(read_bytes(path), f"the image '{path}'")


def read_bytes(path: str | Path) -> bytes:
    """The content of a picture file.

    Raises:
        PictureError: no such file, a directory, one that may not be read or that is too large.
    """
    try:
        file = Path(path)
        if file.is_dir():
            raise PictureError(f"Cannot read the image '{path}': it is a directory.")
        if file.exists() and not file.is_file():
            raise PictureError(f"Cannot read the image '{path}': it is no regular file.")
        if (size := file.stat().st_size) > MAX_BYTES:
            raise PictureError(f"Cannot read the image '{path}': {size} bytes; at most {MAX_BYTES} are read.")
        return file.read_bytes()
    except PictureError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path that holds a NUL character
        raise PictureError(f"Cannot read the image '{path}': {getattr(error, 'strerror', None) or error}.") from None


def decode_picture(
    data: bytes, name: str, *, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture in memory as a viewer shows it.

    Args:
        data: the content of a picture file.
        name: what messages call it.
        formats: that are taken, some of `FORMATS`.
        max_pixels: refuse larger pictures before they are decoded.

    Returns:
        An image of mode RGB.

    Raises:
        PictureError: no picture of these formats; one that is broken, cut off, too large or animated; or pixels that
            no viewer shows in one way.
    """
    if not data:
        raise PictureError(f"Cannot read {name}: it is empty (0 bytes).")
    try:
        return _decode(data, formats, max_pixels)
    except PictureError as error:
        raise PictureError(f"Cannot read {name}: {error}") from None
    except Image.UnidentifiedImageError:
        kind = kind_of(data)
        known = ", ".join(format for format in formats if format != "DIB")
        said = f"it is {kind}" if kind else "broken, or no picture of a known format"
        if kind in _PICTURES:
            said = f"broken ({kind} by its first bytes)"
        raise PictureError(f"Cannot read {name}: {said}. Formats that are read: {known}.") from None
    except Image.DecompressionBombError:
        raise PictureError(f"Cannot read {name}: {_too_large(max_pixels)}") from None
    except MemoryError:
        raise PictureError(f"Cannot read {name}: there is not enough memory to decode it.") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        said = str(error).rstrip(".") or type(error).__name__
        raise PictureError(f"Cannot read {name}: broken ({said:.200}). Export it again, or leave it out.") from None


def _decode(data: bytes, formats: Sequence[str], max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(_without_notes(data)), formats=list(formats)) as opened:
        width, height = opened.size
        if width < 1 or height < 1:
            raise PictureError(f"it has {width} x {height} pixels.")
        if width * height > max_pixels:
            raise PictureError(f"{width} x {height} pixels: {_too_large(max_pixels)}")
        frames = getattr(opened, "n_frames", 1)
        if frames > 1 and opened.format not in _ONE_PHOTO:
            raise PictureError(
                f"it holds {frames} frames or pages: save the one that is meant as a picture of its own."
            )
        opened.load()
        turn = _TURNS.get(_orientation(opened))
        # A turn keeps mode, palette and `info`, so that what follows need not know of it.
        picture = opened if turn is None else opened.transpose(turn)
        picture.info = dict(opened.info)
        return _shown(_eight_bits(picture, opened.format, data))


def _too_large(max_pixels: int) -> str:
    return f"more than {max_pixels} pixels are taken for a decompression bomb. Scale it down."


def _without_notes(data: bytes) -> bytes:
    """A PNG without its text, which Pillow limits and no viewer needs; other files as they are."""
    if not data.startswith(_PNG):
        return data
    kept, start, position = [], 0, len(_PNG)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind in _TEXT_CHUNKS and not data.startswith(_SHOWN_TEXT, position + 8):
            kept.append(data[start:position])
            start = end
        position = end
    return b"".join([*kept, data[start:]]) if kept else data


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none, or none that can be read, as viewers have it."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises whatever a broken block leads it to
        return 1


def _eight_bits(picture: Image.Image, format: str | None, data: bytes) -> Image.Image:
    """The same picture in a mode of 8 bits a channel or less.

    Raises:
        PictureError: pixels whose black and white nobody says.
    """
    if format == "PNG" and data[24] == 16 and "transparency" in picture.info:
        raise PictureError("it has 16 bits a channel and one transparent colour: save it with an alpha channel.")
    # A PPM of more than 8 bits is scaled to 16 of them, and kept in 32.
    if picture.mode.startswith("I;16") or (format == "PPM" and picture.mode == "I"):
        values = np.asarray(picture).astype(np.uint32)
        reduced = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        reduced.info = picture.info
        return reduced
    if picture.mode not in _MODES:
        raise PictureError(
            f"its pixels are of the mode '{picture.mode}', which has no agreed black and white or no plain way to "
            "sRGB: save it as 8-bit RGB."
        )
    return picture


def _shown(picture: Image.Image) -> Image.Image:
    """The picture in sRGB, what is transparent on white."""
    alpha = None
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        alpha = layer.getchannel("A")
        picture = picture.convert("LA").getchannel("L") if picture.mode in ("LA", "La") else _like(picture, layer)
    if picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode not in ("L", "CMYK"):
        picture = picture.convert("RGB")
    colours = _managed(picture)
    if alpha is None:
        return colours
    white = Image.new("RGBA", colours.size, "white")
    colours.putalpha(alpha)
    return Image.alpha_composite(white, colours).convert("RGB")


def _like(picture: Image.Image, layer: Image.Image) -> Image.Image:
    """The colours of a picture without its transparency, grey where they are."""
    opaque = layer.convert("RGB")
    if picture.mode in ("1", "L"):
        opaque = opaque.getchannel("R")
    opaque.info = picture.info
    return opaque


def _managed(picture: Image.Image) -> Image.Image:
    """The picture in sRGB by its embedded profile; a profile that is broken or for other pixels is ignored."""
    embedded = picture.info.get("icc_profile")
    if embedded:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
            fits = _PROFILE_MODES.get(profile.profile.xcolor_space) == picture.mode
            if fits and "srgb" not in ImageCms.getProfileDescription(profile).lower():
                managed = ImageCms.profileToProfile(picture, profile, _SRGB, outputMode="RGB")
                assert managed is not None  # it is where the change is made in place
                return managed
        except (ImageCms.PyCMSError, OSError):
            pass
    return picture.convert("RGB")
