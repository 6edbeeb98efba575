"""One LightningDataModule a kind of data."""

from datamodules.annotations import AnnotationDataModule
from datamodules.captioned_images import CaptionedDataset, CaptionedImageDataModule
from datamodules.preferences import PreferenceDataModule
from datamodules.prompts import PromptDataModule

__all__ = [
    "AnnotationDataModule",
    "CaptionedDataset",
    "CaptionedImageDataModule",
    "PreferenceDataModule",
    "PromptDataModule",
]
