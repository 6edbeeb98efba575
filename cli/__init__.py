"""The command line: `train.py` and the reward server."""
