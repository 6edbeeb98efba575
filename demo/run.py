"""`python -m demo.run` (what `make demo` calls): train, test, report. Every stage is a command you can run yourself."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

from demo.pipeline.recipe import SELECTIONS, Plan, stages
from demo.pipeline.report import build_report
from demo.pipeline.stage_runner import StageRunner
from flow_rl.errors import SettingError
from flow_rl.evaluation import write_report
from flow_rl.evaluation.records import TASKS
from flow_rl.evaluation.report import report_paths
from flow_rl.files import refuse_foreign_text


def main() -> None:
    """Parse the command line, run the stages, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stages",
        choices=SELECTIONS,
        default=Plan.selection,
        help="the whole recipe, or a text-to-image teacher alone that verifiers reward: no reward model is trained",
    )
    parser.add_argument(
        "--upper-bound", action="store_true", help="of the whole recipe, also both teachers with verifiers as rewards"
    )
    parser.add_argument("--quick", action="store_true", help="every stage in small: does it work, not what can it do")
    parser.add_argument("--jobs", type=int, default=None, help="stages at a time; 2 for the whole recipe, else 1")
    args, extra = parser.parse_known_args()
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; at least one stage runs at a time.")
    if args.upper_bound and args.stages != "all":
        parser.error("--upper-bound compares with the whole recipe: leave --stages out.")
    # With one teacher to train, a second stage would take its cores away for most of the time.
    jobs = args.jobs or (2 if args.stages == "all" else 1)
    plan = Plan(
        directory=args.dir,
        seed=args.seed,
        selection=args.stages,
        upper_bound=args.upper_bound,
        quick=args.quick,
        jobs=jobs,
        extra=extra,
    )
    try:  # what comes last, looked at first
        for path in (*report_paths(plan.directory), *(plan.directory / f"battles_{task}.jsonl" for task in TASKS)):
            refuse_foreign_text(path)
    except SettingError as error:
        parser.error(str(error))
    start, todo = time.monotonic(), stages(plan)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated. The same command resumes from here."))
    runner = StageRunner(plan.directory, jobs=plan.jobs)
    try:
        runner.run(todo)
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command resumes from here.")
    report = build_report(plan, seconds=runner.seconds, commands=[stage.command for stage in todo])
    page, data = write_report(report, plan.directory)
    print("\n" + "\n".join(report.summary[1:]))
    print(f"\n{len(todo)} stages in {(time.monotonic() - start) / 60:.1f} min")
    print(f"\nReport:      {page}\nNumbers:     {data}\nTensorBoard: tensorboard --logdir {shlex.quote(str(args.dir))}")


if __name__ == "__main__":
    main()
