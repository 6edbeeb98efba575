"""Which prompts are worth training on, and with which weights: from raw scores of the base, before training."""
