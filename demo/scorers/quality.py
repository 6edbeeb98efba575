"""Quality of an image, 1 to 5, learned from renders corrupted with a known severity.

Shapes: N images, C = 3, H = W = 32.
"""

from __future__ import annotations

from torch import Tensor, nn

from demo.scorers.weights import VerifierName, check_name, load_weights

WIDTHS: dict[str, int] = {"annotator": 24, "judge": 28, "monitor": 20}


class QualityScore(nn.Module):
    """Scores how free of corruption images are: 5 for a clean render, 1 for a wrecked one.

    The score of a render corrupted with severity s (``demo.world.degrade.corrupt``) is trained to be 5 - 4 s.

    Args:
        width: channels of the first convolution.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        w = width
        layers: list[nn.Module] = []
        for channels_in, channels_out in ((3, w), (w, 2 * w), (2 * w, 3 * w), (3 * w, 3 * w)):
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(12 * w, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)

    @classmethod
    def load(cls, name: VerifierName) -> QualityScore:
        """The shipped score ``"annotator"``, ``"judge"`` or ``"monitor"``, in evaluation mode.

        Raises:
            ValueError: for another name.
            FileNotFoundError: when its weights have not been trained.
        """
        check_name(name)
        return load_weights(cls(width=WIDTHS[name]), f"quality-{name}.safetensors")

    def forward(self, images: Tensor) -> Tensor:
        """Scores in (1, 5), float32 (N,), of images (N, 3, 32, 32) in [0, 1]."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 32, 32):
            raise ValueError(f"images must have shape (N, 3, 32, 32), received {tuple(images.shape)}.")
        return 1 + 4 * self.head(self.trunk((images.float() - 0.5) * 4))[:, 0].sigmoid()
