"""Annotation and preference files for reward fine-tuning, scored by rules."""
