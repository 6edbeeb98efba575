"""The demo's prompt files: ``python -m demo.making.prompts`` writes them again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from demo.world.captions import caption
from demo.world.vocabulary import CATEGORIES
from demo.world.world import SPLITS, make_scene
from flow_rl.errors import SettingError
from flow_rl.files import put_texts

PROMPT_SEED = 2026
COUNTS = {"train": 4000, "validation": 100, "test": 1000}
#: training prompts before the ids of the other splits. Ids decide the noise that images are made from: the training
#: prompts that were added later come last, so that no validation or test image changed with them.
_FIRST_TRAIN = 2000
DIRECTORY = Path(__file__).parents[1] / "prompts"


def prompt_records(split: str) -> list[dict[str, int | str]]:
    """The prompts of a split: categories take turns."""
    records = []
    for index in range(COUNTS[split]):
        category = CATEGORIES[index % len(CATEGORIES)]
        scene = make_scene(PROMPT_SEED, index, split=split, category=category)
        prompt = caption(scene, PROMPT_SEED, index)
        records.append({"id": _prompt_id(split, index), "prompt": prompt, "category": category})
    return records


def _prompt_id(split: str, index: int) -> int:
    """Training, validation, test, then the rest of training."""
    if split == "train":
        return index if index < _FIRST_TRAIN else index + COUNTS["validation"] + COUNTS["test"]
    return _FIRST_TRAIN + index + (COUNTS["validation"] if split == "test" else 0)


def prompt_lines(split: str) -> str:
    """The JSON Lines text of a split's file."""
    return "".join(json.dumps(record) + "\n" for record in prompt_records(split))


def main() -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where to write")
    directory = parser.parse_args().directory
    try:
        put_texts({directory / f"{split}.jsonl": prompt_lines(split) for split in SPLITS})
    except SettingError as error:
        parser.error(str(error))
    for split in SPLITS:
        print(f"{directory / f'{split}.jsonl'}: {COUNTS[split]} prompts")


if __name__ == "__main__":
    main()
