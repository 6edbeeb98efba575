"""One LightningDataModule a kind of data."""

from datamodules.alternating import AlternatingTaskDataModule
from datamodules.annotations import AnnotationDataModule
from datamodules.captioned_images import CaptionedDataset, CaptionedImageDataModule
from datamodules.edit_pairs import EditPairDataModule
from datamodules.mixed import MixedTaskDataModule
from datamodules.preferences import PreferenceDataModule
from datamodules.prompts import PromptDataModule

__all__ = [
    "AlternatingTaskDataModule",
    "AnnotationDataModule",
    "CaptionedDataset",
    "CaptionedImageDataModule",
    "EditPairDataModule",
    "MixedTaskDataModule",
    "PreferenceDataModule",
    "PromptDataModule",
]
