"""One GRPO iteration: sampling, scores, advantages, objectives and shadow weights."""
