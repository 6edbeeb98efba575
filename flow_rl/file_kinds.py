"""What a file holds, told by its first bytes, for messages about files that are not what their name says."""

from __future__ import annotations

#: first bytes of formats that are met in place of another, with what to do about them
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip-compressed data: decompress it (gunzip)"),
    (b"PK\x03\x04", "a ZIP archive: unpack it"),
    (b"BZh", "bzip2-compressed data: decompress it (bunzip2)"),
    (b"\xfd7zXZ\x00", "xz-compressed data: decompress it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "Zstandard-compressed data: decompress it (unzstd)"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"PAR1", "a Parquet table: export its rows as JSON Lines"),
    (b"ARROW1", "an Arrow table: export its rows as JSON Lines"),
    (b"SQLite format 3\x00", "an SQLite database: export its rows as JSON Lines"),
    (b"%PDF", "a PDF document"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
)


def kind_of(data: bytes) -> str | None:
    """What a file holds and how to get at it, told by its first bytes; None for text and for what is not known."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "a WebP picture"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "a HEIC picture: convert it to JPEG or PNG"
    if data[4:8] == b"ftyp":
        return "a video, or another container of this family"
    if data[:1024].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page, as a failed download leaves: download the file again"
    if data[:1024].lstrip().lower().startswith((b"<svg", b"<?xml")):
        return "XML, such as an SVG drawing: export it as PNG"
    if data[257:262] == b"ustar":
        return "a tar archive: unpack it"
    return None
