"""Pictures from files, as every data module reads them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError


def open_picture(path: Path) -> Image.Image:
    """An image in RGB; transparent parts are shown on white, as a viewer would show them.

    Raises:
        ValueError: a file that is missing, cut off or no image.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                layer = picture.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"Cannot read the image '{path}': {error}.") from None
