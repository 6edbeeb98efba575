"""Runs the checks of a part inside a time budget; a check that fails is recorded, and the next one starts."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Check
from benchmarks.gpu.report import Report, table

#: statuses that make the battery's exit code non-zero
FAILURES = ("failed", "error", "killed")


class Budget:
    """Seconds that are left.

    Args:
        seconds: in all, from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.seconds - self.spent


def run_checks(checks: Sequence[Check], bench: Bench, budget: Budget, report: Report) -> bool:
    """Run checks in their order, which is that of their value.

    Args:
        checks: of one part.
        bench: where they run.
        budget: a check whose estimate exceeds what is left is skipped; smaller ones behind it still run.
        report: gets every row once it is measured.

    Returns:
        Whether none of them failed.
    """
    for check in checks:
        record = report.start(check.name, check.question)
        if not bench.tiny and budget.left < check.seconds:
            record["status"] = "skipped"
            record["reason"] = f"Needs about {check.seconds:.0f} s; {max(budget.left, 0):.0f} s were left."
        else:
            print(f"[{budget.left:4.0f} s left] {check.name}: {check.question}", flush=True)
            _run(check, bench, record, report)
        report.write()
        print(f"{check.name}: {record['status']}" + (f" ({record['reason']})" if "reason" in record else ""))
        print("\n".join(table(record["rows"])), flush=True)
    report.end(budget.spent)
    return not any(record["status"] in FAILURES for record in report.checks)


def _run(check: Check, bench: Bench, record: dict[str, Any], report: Report) -> None:
    start = time.monotonic()
    bench.reset_peak()
    try:
        for row in check.run(bench):
            report.add(record, row)
        broken = [f"{row['name']}: {name}" for row in record["rows"] for name in row.get("broken", ())]
        limited = any("limits" in row for row in record["rows"])
        record["status"] = "failed" if broken else ("passed" if limited else "measured")
        if broken:
            record["reason"] = f"Above the limit: {', '.join(broken)}."
    except torch.OutOfMemoryError as error:
        record["status"] = "out_of_memory"
        record["reason"] = str(error).splitlines()[0]
        if bench.cuda:
            record["memory"] = torch.cuda.memory_summary(bench.device, abbreviated=True)
    except Exception as error:  # whatever it is, the other checks are worth their time
        record["status"] = "error"
        record["reason"] = f"{type(error).__name__}: {error}"
        record["traceback"] = traceback.format_exc()
    record["seconds"] = time.monotonic() - start
    record["memory_peaks"] = bench.peaks()
    if record["status"] in ("error", "out_of_memory"):
        bench.forget()  # what the checks share may be damaged
    bench.clean()
