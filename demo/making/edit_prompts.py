"""The demo's edit files: ``python -m demo.making.edit_prompts --output runs/demo/edits`` renders and writes them.

Everything is a pure function of (seed, index); nothing is drawn that the base was trained on, as splits hold.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from demo.world.edits import EDITABLE, EditPair, make_edit
from demo.world.world import SPLITS, Scene, render

EDIT_SEED = 2027
COUNTS = {"train": 1000, "validation": 60, "test": 400}
#: ids of edits start here: apart from those of the prompt files, so that a report can hold both
FIRST_ID = 100_000
#: splits whose targets are written too: they are for looking at and for evaluation, and training needs none
WITH_TARGETS = ("validation", "test")


def edit_of(split: str, index: int) -> tuple[int, EditPair]:
    """Id and pair of a split's edit: categories take turns, ids continue from one split to the next."""
    first = FIRST_ID + sum(COUNTS[earlier] for earlier in SPLITS[: SPLITS.index(split)])
    category = list(EDITABLE)[index % len(EDITABLE)]
    return first + index, make_edit(EDIT_SEED, index, split=split, category=category)


def write_edits(directory: Path, split: str, count: int) -> Path:
    """Write `<split>.jsonl` and the images that it names, in `images/`.

    Args:
        directory: made where it is missing.
        split: of every source and target.
        count: edits, the first of the split's.

    Returns:
        the file.
    """
    (directory / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        number, pair = edit_of(split, index)
        record = {"id": number, "instruction": pair.instruction, "category": pair.category}
        record["source"] = _save(pair.source, directory, f"images/{number}.png")
        if split in WITH_TARGETS:
            record["target"] = _save(pair.target, directory, f"images/{number}-target.png")
        records.append(record)
    path = directory / f"{split}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _save(scene: Scene, directory: Path, name: str) -> str:
    Image.fromarray(render(scene)).save(directory / name)
    return name


def main() -> None:
    """Write train.jsonl, validation.jsonl, test.jsonl and their images."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where to write")
    parser.add_argument("--count", type=float, default=1.0, help="share of the edits to write")
    args = parser.parse_args()
    for split in SPLITS:
        count = max(1, round(args.count * COUNTS[split]))
        print(f"{write_edits(args.output, split, count)}: {count} edits")


if __name__ == "__main__":
    main()
