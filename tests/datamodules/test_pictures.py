"""Pictures from files: the same pixels whoever reads them, and a message where there are none."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from datamodules import annotation_files, edit_pairs
from datamodules.pictures import open_picture


def test_transparent_parts_are_white_in_annotations_and_in_edits(tmp_path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    seen = annotation_files.read_image(tmp_path / "clear.png")
    assert torch.equal(seen, torch.full((3, 2, 2), 255, dtype=torch.uint8))
    assert torch.equal(edit_pairs.read_image(tmp_path / "clear.png", 2), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("content", [b"", b"not a picture", None], ids=["empty", "text", "cut off"])
def test_what_is_no_picture_is_named(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(ValueError, match=r"Cannot read the image '.*a\.png'"):
        open_picture(path)
