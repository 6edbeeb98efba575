"""Measure one GPU: `python -m benchmarks.gpu --part A --minutes 8 --output DIR`.

Parts: A, numerics; B, evaluations and updates at real size; C, whole iterations. Each part stands alone, downloads
nothing and fits one device with 80 GB. With `--device cpu --tiny` the same code runs in small. The exit code is 1 if a
check failed. docs/gpu.md explains what is measured and what to expect.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

#: seconds after the budget at which a check that hangs is ended, with the traceback of every thread
GRACE = 45


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("A", "B", "C"), required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="start no check that would end later")
    parser.add_argument(
        "--output", type=Path, help="directory of part_<part>.json and .md; needed unless --list is given"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the demo base's dimensions, for a CPU")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="run these checks alone")
    parser.add_argument("--list", action="store_true", help="print the part's checks and stop")
    args = parser.parse_args(arguments)
    if args.output is None and not args.list:
        parser.error("--output is missing: the directory of the report.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part; returns the exit code."""
    args = parsed(arguments)
    if args.part == "A":
        # Only with this are cuBLAS products repeatable, and only if it is set before the first of them.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch

    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.machine import describe
    from benchmarks.gpu.parts import PARTS
    from benchmarks.gpu.report import Report
    from benchmarks.gpu.runner import Budget, run_checks

    checks = PARTS[args.part]()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if args.list:
        for check in checks:
            print(f"{check.name:20} {check.seconds:4.0f} s  {check.question}")
        return 0
    unknown = set(args.only or ()) - {check.name for check in checks}
    if unknown:
        print(f"--only: no check named {', '.join(sorted(unknown))} in part {args.part}; see --list.", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device. On a CPU: --device cpu --tiny.", file=sys.stderr)
        return 2
    checks = [check for check in checks if not args.only or check.name in args.only]
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    budget = Budget(60 * args.minutes)
    if not args.tiny:
        faulthandler.dump_traceback_later(60 * args.minutes + GRACE, exit=True)
    header = {"tiny": args.tiny, "minutes": args.minutes, "machine": describe(device)}
    try:
        with tempfile.TemporaryDirectory(prefix="gpu_battery_") as scratch:
            bench = Bench(device=device, tiny=args.tiny, directory=Path(scratch))
            passed = run_checks(checks, bench, budget, Report(args.output, args.part, header))
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
