"""Advice of libraries that does not apply here."""

from __future__ import annotations

import logging
import warnings


def leave_out_advice() -> None:
    """Leave out advice that does not apply here, each piece by its own words: nothing else is lost."""
    # Prompts are read once into memory: worker processes would only cost their start.
    warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")
    # A batch's record knows how to move itself: the module's way is the one meant, whatever the data.
    warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device`")
    # A pass over fixed annotations is streamed, rank by rank, and does know its length.
    warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
    # Batches are whole, and what is drawn names its prompts: no writer of predictions needs indices.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
    # Curation writes its scores as it goes; there is nothing to return.
    warnings.filterwarnings("ignore", message="predict returned None")
    # The frozen encoders are in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    # A checkpoint follows whole iterations, and resuming from one is bit for bit the run that went on.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    # Lightning's own use of torch, which its next release changes.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).* is deprecated")
    # `main(args)` is meant to be called from Python, whatever the calling program's own arguments.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    # peft imports bitsandbytes, whether or not anything is quantised. Without this kernel it computes in another way.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_about_no_kernel)


def _is_about_no_kernel(record: logging.LogRecord) -> bool:
    return "Failed to load CPU gemm_4bit_forward" not in record.getMessage()


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not any(name in record.getMessage() for name in ("[litlogger]", "[litmodels]"))
