"""`python -m demo.run` (what `make demo` calls): train, test, report. Every stage is a command you can run yourself."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from demo.recipe import SELECTIONS, Plan, stages
from demo.report import build_report
from demo.stages import StageRunner
from evaluation import write_report


def main() -> None:
    """Parse the command line, run the stages, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stages", choices=SELECTIONS, default="t2i", help="the text-to-image teacher, or the whole recipe"
    )
    parser.add_argument("--quick", action="store_true", help="every stage in small: does it work, not what can it do")
    args, extra = parser.parse_known_args()
    plan = Plan(directory=args.dir, seed=args.seed, selection=args.stages, quick=args.quick, extra=extra)
    runner, todo = StageRunner(directory=plan.directory), stages(plan)
    for number, stage in enumerate(todo, start=1):
        runner.run(stage, f"{number}/{len(todo)}")
    commands = [s.command for s in todo if s.name not in runner.left_out]
    report = build_report(plan, seconds=runner.seconds, commands=commands, left_out=runner.left_out)
    page, data = write_report(report, plan.directory)
    print("\n" + "\n".join(report.summary[1:]))
    print(f"\nReport:      {page}\nNumbers:     {data}\nTensorBoard: tensorboard --logdir {shlex.quote(str(args.dir))}")


if __name__ == "__main__":
    main()
