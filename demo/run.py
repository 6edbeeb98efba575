"""`python -m demo.run` (what `make demo` calls): train, test, report. Every stage is a command you can run yourself."""

from __future__ import annotations

import argparse
from pathlib import Path

from demo.report import build_report
from demo.stages import Stage, StageRunner
from evaluation import write_report

TEACHER = Path("configs/demo/t2i_teacher.yaml")
TEST = Path("configs/demo/test.yaml")
BASE = Path("demo/base")
PROMPTS = Path("demo/prompts")
ASSETS = Path("demo/assets")
#: rooms whose code a training run depends on
CODE = tuple(Path(room) for room in ("flow", "lightning_modules", "models"))


def stages(directory: Path, seed: int, extra: list[str]) -> list[Stage]:
    """The commands of one demo run.

    Args:
        directory: where everything is written.
        seed: of data order and noise.
        extra: further arguments for training, such as `--trainer.max_steps=20`.
    """
    common = [f"--run.dir={directory}", f"--run.seed={seed}"]
    teacher = directory / "t2i_teacher"
    fit = Stage(
        name="t2i_teacher",
        arguments=["train.py", "fit", f"--config={TEACHER}", *common, *extra],
        inputs=[TEACHER, BASE, PROMPTS, ASSETS, *CODE],
        output=teacher / "export" / "model_index.json",
    )
    made = [fit]
    for name, model in (("base", BASE), ("t2i_teacher", teacher / "export")):
        run = f"test_{name}"
        arguments = ["train.py", "test", f"--config={TEACHER}", f"--config={TEST}", *common]
        made.append(
            Stage(
                name=run,
                arguments=[*arguments, f"--run.name={run}", f"--model.model_path={model}"],
                inputs=[TEACHER, TEST, model, PROMPTS, ASSETS, *CODE],
                output=directory / run / "test_scores.jsonl",
            )
        )
    return made


def main() -> None:
    """Parse the command line, run the stages, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0)
    args, extra = parser.parse_known_args()
    runner = StageRunner(directory=args.dir)
    todo = stages(args.dir, args.seed, extra)
    for number, stage in enumerate(todo, start=1):
        runner.run(stage, f"{number}/{len(todo)}")
    report = build_report(args.dir, runner.seconds, [s.command for s in todo], {"seed": args.seed, "extra": extra})
    page, data = write_report(report, args.dir)
    gain = report.gains["overall"]
    print(
        f"\nJudge accuracy on held-out prompts: gain {100 * gain.mean:+.1f} points "
        f"(95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f})\n"
        f"Report:      {page}\nNumbers:     {data}\nTensorBoard: tensorboard --logdir {args.dir}"
    )


if __name__ == "__main__":
    main()
