"""The demo's edit files: ``python -m demo.making.edit_prompts --output runs/demo/edits`` renders and writes them.

Everything is a pure function of (seed, index); nothing is drawn that the base was trained on, as splits hold.
"""

from __future__ import annotations

import argparse
import json
from io import BytesIO
from pathlib import Path

from PIL import Image

from demo.world.edits import EDITABLE, EditPair, make_edit
from demo.world.world import SPLITS, Scene, render
from flow_rl.errors import SettingError
from flow_rl.files import put_files

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

    Raises:
        SettingError: a file of somebody else's, or one that was edited since, would be replaced.
    """
    files: dict[str | Path, bytes] = {}
    records = []
    for index in range(count):
        number, pair = edit_of(split, index)
        record = {"id": number, "instruction": pair.instruction, "category": pair.category}
        record["source"] = _add(files, pair.source, directory, f"images/{number}.png")
        if split in WITH_TARGETS:
            record["target"] = _add(files, pair.target, directory, f"images/{number}-target.png")
        records.append(record)
    path = directory / f"{split}.jsonl"
    files[path] = "".join(json.dumps(record) + "\n" for record in records).encode()
    put_files(files, durable=False)
    return path


def _add(files: dict[str | Path, bytes], scene: Scene, directory: Path, name: str) -> str:
    buffer = BytesIO()
    Image.fromarray(render(scene)).save(buffer, "PNG")
    files[directory / name] = buffer.getvalue()
    return name


def main() -> None:
    """Write train.jsonl, validation.jsonl, test.jsonl and their images."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where to write")
    parser.add_argument("--count", type=float, default=1.0, help="share of the edits to write")
    args = parser.parse_args()
    for split in SPLITS:
        count = max(1, round(args.count * COUNTS[split]))
        try:
            print(f"{write_edits(args.output, split, count)}: {count} edits")
        except SettingError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
