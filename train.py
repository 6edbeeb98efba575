"""The entry point: `python train.py fit|validate|test|predict|curate|doctor --config ...`; see `cli.app`."""

from cli.entry import main

if __name__ == "__main__":
    main()
