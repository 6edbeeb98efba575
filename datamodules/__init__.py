"""One LightningDataModule a kind of data."""

from datamodules.captioned_images import CaptionedDataset, CaptionedImageDataModule
from datamodules.edit_pairs import EditPairDataModule
from datamodules.prompts import PromptDataModule

__all__ = ["CaptionedDataset", "CaptionedImageDataModule", "EditPairDataModule", "PromptDataModule"]
