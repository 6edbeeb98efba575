"""One LightningDataModule a kind of data, imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flow_rl.lazy_names import on_demand

if TYPE_CHECKING:
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
__getattr__, __dir__ = on_demand(
    __name__,
    {
        "AlternatingTaskDataModule": "alternating",
        "AnnotationDataModule": "annotations",
        "CaptionedDataset": "captioned_images",
        "CaptionedImageDataModule": "captioned_images",
        "EditPairDataModule": "edit_pairs",
        "MixedTaskDataModule": "mixed",
        "PreferenceDataModule": "preferences",
        "PromptDataModule": "prompts",
    },
)
