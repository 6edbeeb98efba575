"""`python -m demo.seeds DIR...`: what several runs of the demo found, claim by claim, as a Markdown table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load_report(directory: Path) -> dict[str, Any]:
    """`report.json` of a run.

    Raises:
        ValueError: a directory without one.
    """
    path = directory / "report.json"
    if not path.is_file():
        raise ValueError(f"No '{path}': give directories that `make demo` wrote, such as runs/demo.")
    return json.loads(path.read_text(encoding="utf-8"))


def claims_table(reports: Sequence[dict[str, Any]]) -> str:
    """One row a claim, one column a run, and in how many runs each claim holds.

    Args:
        reports: contents of `report.json`; a claim that a run does not make stays empty there.
    """
    seeds = [str(report["settings"]["seed"]) for report in reports]
    found = [{claim["text"]: claim for claim in report["claims"]} for report in reports]
    rows = [["claim", *(f"seed {seed}" for seed in seeds), "holds"], ["---"] * (len(seeds) + 2)]
    for text in dict.fromkeys(text for claims in found for text in claims):
        cells = [f"{claims[text]['found']}: {claims[text]['verdict']}" if text in claims else "" for claims in found]
        held = sum(text in claims and claims[text]["verdict"] == "holds" for claims in found)
        rows.append([text, *cells, f"{held} of {len(found)}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(args: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path, help="runs of the demo, with different seeds")
    given = parser.parse_args(args)
    try:
        print(claims_table([load_report(directory) for directory in given.directories]))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
