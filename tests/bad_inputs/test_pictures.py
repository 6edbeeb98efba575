"""Pictures of every kind: the pixels that the format's own rules give, computed without the reader, or one refusal."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from datamodules.faults import Faults
from datamodules.pictures import Memory, PictureUse, check_pictures
from flow_rl.pictures import PictureError, decode_picture, read_picture

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], *extra: bytes) -> bytes:
    """A PNG by hand (ISO/IEC 15948): rows are bytes as they are stored, each without a filter."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def saved(picture: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def pixels(data: bytes) -> list[list[tuple[int, ...]]]:
    image = decode_picture(data, "it")
    assert image.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


PALETTE = chunk(b"PLTE", bytes([*RED, *GREEN, *BLUE]))
#: a file and its pixels, by the rules of its format
MODES = {
    "1 bit": (png(2, 1, 1, 0, [b"\x40"]), [[BLACK, WHITE]]),
    "2 bits of grey": (png(4, 1, 2, 0, [b"\x1b"]), [[BLACK, (85,) * 3, (170,) * 3, WHITE]]),
    "grey": (png(2, 1, 8, 0, [b"\x00\x80"]), [[BLACK, (128,) * 3]]),
    "16 bits of grey": (png(3, 1, 16, 0, [struct.pack(">3H", 0, 32896, 65535)]), [[BLACK, (128,) * 3, WHITE]]),
    "16 bits of grey, rounded": (png(1, 1, 16, 0, [struct.pack(">H", 32895)]), [[(128,) * 3]]),
    "16 bits of colour": (png(1, 1, 16, 2, [struct.pack(">3H", 65535, 257, 0)]), [[(255, 1, 0)]]),
    "grey and alpha": (png(2, 1, 8, 4, [b"\x00\xff\x00\x00"]), [[BLACK, WHITE]]),
    "colour and alpha": (png(2, 1, 8, 6, [bytes([*RED, 255, *RED, 0])]), [[RED, WHITE]]),
    "half transparent": (png(1, 1, 8, 6, [bytes([*RED, 51])]), [[(255, 204, 204)]]),
    "palette": (png(3, 1, 8, 3, [b"\x00\x01\x02"], PALETTE), [[RED, GREEN, BLUE]]),
    "palette of 1 bit": (png(2, 1, 1, 3, [b"\x40"], PALETTE), [[RED, GREEN]]),
    "palette with alpha": (png(2, 1, 8, 3, [b"\x00\x01"], PALETTE, chunk(b"tRNS", b"\x00")), [[WHITE, GREEN]]),
    "grey with a clear level": (png(2, 1, 8, 0, [b"\x07\x08"], chunk(b"tRNS", b"\0\x07")), [[WHITE, (8,) * 3]]),
    "a clear colour": (png(2, 1, 8, 2, [bytes([*RED, *BLUE])], chunk(b"tRNS", b"\0\xff\0\0\0\0")), [[WHITE, BLUE]]),
    "a long text": (png(1, 1, 8, 0, [b"\x05"], chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 23)))), [[(5,) * 3]]),
    "text of one letter": (png(1, 1, 8, 0, [b"\x05"], chunk(b"tEXt", b"a\0b")), [[(5,) * 3]]),
    "PPM": (b"P6 1 1 255\n" + bytes(RED), [[RED]]),
    "PGM of 16 bits": (b"P5 2 1 65535\n" + struct.pack(">2H", 0, 65535), [[BLACK, WHITE]]),
    "PBM": (b"P4 2 1\n\x40", [[WHITE, BLACK]]),  # there a 1 is black
    "BMP": (saved(Image.new("RGB", (1, 1), RED), "BMP"), [[RED]]),
    "GIF": (saved(Image.new("RGB", (1, 1), RED), "GIF"), [[RED]]),
    "TIFF of 16 bits": (saved(Image.fromarray(np.array([[65535, 0]], np.uint16)), "TIFF"), [[WHITE, BLACK]]),
    "TIFF in CMYK": (saved(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [[RED]]),
    "WebP with alpha": (saved(Image.new("RGBA", (1, 1), (*RED, 0)), "WEBP", lossless=True, exact=True), [[WHITE]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_has_the_pixels_of_its_format(kind: str) -> None:
    data, expected = MODES[kind]
    assert pixels(data) == expected


def test_a_jpeg_in_cmyk_and_one_of_another_name_are_read(tmp_path: Path) -> None:
    """Red is no cyan, all magenta and yellow. What a file is called says nothing of what it holds."""
    path = tmp_path / "photo.png"
    path.write_bytes(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = read_picture(path).getpixel((4, 4))
    assert red > 250
    assert max(green, blue) < 5


#: where the letters of `ab / cd` are as a viewer shows them, by the EXIF specification's own words for each value:
#: the side at which row 0 and the side at which column 0 of the stored picture is
TURNED = {
    1: "ab/cd", 2: "ba/dc", 3: "dc/ba", 4: "cd/ab", 5: "ac/bd", 6: "ca/db", 7: "db/ca", 8: "bd/ac",
    0: "ab/cd", 9: "ab/cd",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("value", TURNED)
def test_orientation_is_obeyed(kind: str, value: int) -> None:
    shades = {"a": 10, "b": 80, "c": 160, "d": 240}
    stored = Image.fromarray(np.array([[shades["a"], shades["b"]], [shades["c"], shades["d"]]], np.uint8)).convert(
        "RGB"
    )
    exif = Image.Exif()
    exif[0x0112] = value
    data = saved(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    shown = [[pixel[0] for pixel in row] for row in pixels(data)]
    assert shown == [[shades[letter] for letter in row] for row in TURNED[value].split("/")]


def test_a_broken_exif_block_is_ignored_as_viewers_do() -> None:
    assert pixels(saved(Image.new("RGB", (1, 1), RED), "PNG", exif=b"Exif\0\0garbage")) == [[RED]]


def test_an_embedded_profile_is_applied() -> None:
    """A linear profile's mid-grey is sRGB's 188, by the standard's formula 1.055 x^(1/2.4) - 0.055."""
    primaries = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    linear = bytearray(primaries)
    for name in (b"rTRC", b"gTRC", b"bTRC"):  # each curve is replaced by `curv` of no entries: the identity
        at = linear.index(name)
        offset = struct.unpack_from(">I", linear, at + 4)[0]
        linear[offset : offset + 12] = b"curv" + bytes(8)
    at = linear.index(b"desc", 128 + 4)
    offset = struct.unpack_from(">I", linear, at + 4)[0]
    length = struct.unpack_from(">I", linear, at + 8)[0]
    text = bytes(linear[offset : offset + length]).replace("sRGB".encode("utf-16-be"), "Line".encode("utf-16-be"))
    linear[offset : offset + length] = text.replace(b"sRGB", b"Line")
    expected = round(255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055))
    (((red, green, blue),),) = pixels(saved(Image.new("RGB", (1, 1), (128,) * 3), "PNG", icc_profile=bytes(linear)))
    assert max(abs(value - expected) for value in (red, green, blue)) <= 1
    assert pixels(saved(Image.new("RGB", (1, 1), (128,) * 3), "PNG", icc_profile=primaries)) == [[(128,) * 3]]
    assert pixels(saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", icc_profile=b"no profile")) == [[(9, 8, 7)]]


TWO = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)]
GOOD = saved(Image.effect_noise((32, 32), 90), "PNG")
#: content, and words of the refusal
REFUSED = {
    "empty": (b"", "it is empty .0 bytes"),
    "text": (b"a cat", "broken, or no picture of a known format. Formats that are read: PNG, JPEG"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.*git lfs pull"),
    "a web page": (b"<html>404</html>", "an HTML page"),
    "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "XML, such as an SVG drawing: export it as PNG"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture: convert it"),
    "a video": (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
    "PDF": (b"%PDF-1.7", "a PDF document"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a known format"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "gzip-compressed data"),
    "cut off": (GOOD[: len(GOOD) // 2], "broken"),
    "cut in its head": (GOOD[:20], "broken"),
    "a flipped byte": (GOOD[:200] + bytes([GOOD[200] ^ 255]) + GOOD[201:], "broken"),
    "a cut JPEG": (saved(Image.effect_noise((64, 64), 90), "JPEG")[:-900], "broken .image file is truncated"),
    "a bomb": (png(60_000, 60_000, 1, 0, [b"\0"]), "decompression bomb"),
    "a large scan": (png(10_000, 10_000, 1, 0, [b"\0"]), "10000 x 10000 pixels: more than 89478485 pixels"),
    "no width": (png(0, 1, 8, 0, [b""]), "broken|0 x 1 pixels"),
    "GIF of two frames": (saved(TWO[0], "GIF", save_all=True, append_images=TWO[1:]), "it holds 2 frames or pages"),
    "WebP of two frames": (saved(TWO[0], "WEBP", save_all=True, append_images=TWO[1:]), "it holds 2 frames or pages"),
    "PNG of two frames": (saved(TWO[0], "PNG", save_all=True, append_images=TWO[1:]), "it holds 2 frames or pages"),
    "TIFF of two pages": (saved(TWO[0], "TIFF", save_all=True, append_images=TWO[1:]), "it holds 2 frames or pages"),
    "floating point": (saved(Image.new("F", (2, 2)), "TIFF"), "mode 'F', which has no agreed black and white"),
    "32-bit integers": (saved(Image.new("I", (2, 2)), "TIFF"), "mode 'I', which has no agreed"),
    "Lab": (saved(Image.new("LAB", (2, 2)), "TIFF"), "mode 'LAB'"),
    "16 bits and a clear colour": (
        png(1, 1, 16, 0, [b"\0\7"], chunk(b"tRNS", b"\0\7")), "16 bits a channel and one transparent colour",
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", REFUSED)
def test_what_has_no_one_meaning_is_refused_by_name(tmp_path: Path, given: str) -> None:
    content, words = REFUSED[given]
    path = tmp_path / "source.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=rf"^Cannot read the image '.*source\.png': .*{words}"):
        read_picture(path)


@settings(max_examples=80, deadline=None)
@given(at=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_damage_ends_in_pixels_or_in_one_kind_of_error(at: int, value: int, cut: int) -> None:
    data = bytearray(GOOD)
    data[at] = value
    for damaged in (bytes(data), GOOD[:cut]):
        try:
            assert decode_picture(damaged, "it").mode == "RGB"
        except PictureError as error:
            assert "Cannot read it: " in str(error)  # noqa: PT017  (either is right)


def use(path: Path, line: int = 1) -> PictureUse:
    return PictureUse(file="rows.jsonl", line=line, key="source", value=path.name, path=path)


def test_a_good_picture_is_decoded_once_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decoded: list[str] = []

    def decode(data: bytes, name: str) -> Image.Image:
        decoded.append(name)
        return decode_picture(data, name)

    monkeypatch.setattr("datamodules.pictures.decode_picture", decode)
    first, same, bad = (tmp_path / name for name in ("first.png", "same.png", "bad.png"))
    first.write_bytes(GOOD)
    bad.write_bytes(GOOD[:100])
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        faults = Faults()
        check_pictures([use(first), use(first, 2), use(bad, 3)], faults, fits=lambda _, size: seen.append(size))
        assert [fault[:21] for fault in faults.found] == ["rows.jsonl, line 3: s"]
    assert seen == [(32, 32)] * 4
    assert [Path(name.split("'")[1]).name for name in decoded if "bad" not in name] == ["first.png"]
    assert sum("bad" in name for name in decoded) == 2  # what is wrong is looked at again
    same.write_bytes(GOOD)  # another name, the same content
    check_pictures([use(same)], Faults())
    assert not any("same" in name for name in decoded)
    first.write_bytes(GOOD[:50])  # the same name, another content
    check_pictures([use(first)], faults := Faults())
    assert "first.png" in faults.found[0]


def test_a_damaged_or_unwritable_memory_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = Memory()
    memory.new = {"a" * 64: (3, 4), "b" * 64: (5, 6)}
    memory.save()
    memory.path.write_bytes(b"\xff\n" + memory.path.read_bytes())
    assert Memory().sizes == {}
    memory.path.write_text(f"{'a' * 64} 3 4\n{'b' * 64} 5\n\nc 1 2\n{'d' * 64} x 1\n{'e' * 64} 7 8")
    assert Memory().sizes == {"a" * 64: (3, 4), "e" * 64: (7, 8)}
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    memory = Memory()
    memory.new = {"a" * 64: (3, 4)}
    memory.save()


def test_ranks_that_start_together_check_a_share_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        path.write_bytes(b"no picture")
    found: list[str] = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        check_pictures([use(path, i) for i, path in enumerate(paths, 1)], faults := Faults())
        assert len(faults.found) == 3
        found += faults.found
    assert len(set(found)) == 6
