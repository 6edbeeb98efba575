import base64
import io

import pytest
import torch
from PIL import Image

from flow_rl.evaluation.grids import before_after, image_grid, to_data_uri, to_png


def _numbered(n: int, side: int = 2) -> torch.Tensor:
    """Image i is flat at i / 10."""
    return (torch.arange(n, dtype=torch.float32) / 10).view(n, 1, 1, 1).expand(n, 3, side, side)


def test_grid_places_images_row_by_row():
    grid = image_grid(_numbered(5), columns=3, scale=3, padding=1)
    assert grid.shape == (3, 2 * 7 + 1, 3 * 7 + 1)
    for i in range(5):
        top, left = 1 + 7 * (i // 3), 1 + 7 * (i % 3)
        assert torch.all(grid[:, top : top + 6, left : left + 6] == torch.tensor(i / 10))
    assert torch.all(grid[:, 8:, 15:] == 1.0)  # the empty cell
    assert torch.all(grid[:, 0] == 1.0)
    assert torch.all(grid[:, :, 7] == 1.0)


def test_enlargement_repeats_pixels():
    image = torch.rand(1, 3, 4, 5)
    grid = image_grid(image, columns=9, scale=2, padding=0)
    assert torch.equal(grid[:, ::2, ::2], image[0])
    assert torch.equal(grid[:, 1::2, 1::2], image[0])


def test_before_stands_left_of_after():
    before, after = torch.zeros(3, 3, 2, 2), torch.full((3, 3, 2, 2), 0.5)
    grid = before_after(before, after, columns=2, scale=1, padding=1)
    assert grid.shape == (3, 11, 17)
    assert grid[0, 2].tolist() == [1, 1, 0, 0, 1, 0.5, 0.5, 1, 1, 1, 0, 0, 1, 0.5, 0.5, 1, 1]


def test_png_round_trip():
    image = torch.randint(0, 256, (3, 5, 7)).float() / 255
    decoded = Image.open(io.BytesIO(to_png(image)))
    pixels = torch.tensor(list(decoded.getdata()), dtype=torch.float32).view(5, 7, 3).permute(2, 0, 1)
    assert decoded.mode == "RGB"
    assert torch.equal(pixels, (image * 255).round())


def test_out_of_range_values_are_clipped_not_wrapped():
    image = torch.tensor([-0.2, 1.3]).view(1, 1, 2).expand(3, 1, 2)
    assert list(Image.open(io.BytesIO(to_png(image))).getdata()) == [(0, 0, 0), (255, 255, 255)]


def test_large_images_are_shrunk_before_they_are_embedded():
    head, data = to_data_uri(torch.rand(3, 1024, 512)).split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 512)
    assert to_data_uri(torch.rand(3, 32, 32)).startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image_grid(torch.rand(3, 4, 4), 2), r"received \(3, 4, 4\)"),
        (lambda: image_grid(torch.rand(0, 3, 4, 4), 2), "N >= 1"),
        (lambda: image_grid(torch.rand(1, 3, 4, 4), 0), "columns=0"),
        (lambda: before_after(torch.rand(1, 3, 4, 4), torch.rand(2, 3, 4, 4), 1), "same prompts"),
        (lambda: to_png(torch.zeros(3, 4, 4, dtype=torch.uint8)), "uint8"),
        (lambda: to_png(torch.full((3, 4, 4), float("nan"))), "NaN"),
    ],
)
def test_bad_images_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
