"""Speed, as ratios of two ways to do one thing, timed in turns in one run. Never part of the tests."""
