"""The demo's prompt files: ``python -m demo.prompts`` writes them again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from demo.captions import caption
from demo.world import CATEGORIES, SPLITS, make_scene

PROMPT_SEED = 2026
COUNTS = {"train": 2000, "validation": 100, "test": 1000}
DIRECTORY = Path(__file__).parent / "prompts"


def prompt_records(split: str) -> list[dict[str, int | str]]:
    """The prompts of a split: categories take turns, ids continue from one split to the next."""
    first_id = sum(COUNTS[earlier] for earlier in SPLITS[: SPLITS.index(split)])
    records = []
    for index in range(COUNTS[split]):
        category = CATEGORIES[index % len(CATEGORIES)]
        scene = make_scene(PROMPT_SEED, index, split=split, category=category)
        prompt = caption(scene, PROMPT_SEED, index)
        records.append({"id": first_id + index, "prompt": prompt, "category": category})
    return records


def prompt_lines(split: str) -> str:
    """The JSON Lines text of a split's file."""
    return "".join(json.dumps(record) + "\n" for record in prompt_records(split))


def main() -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where to write")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (directory / f"{split}.jsonl").write_text(prompt_lines(split), encoding="utf-8")
        print(f"{directory / f'{split}.jsonl'}: {COUNTS[split]} prompts")


if __name__ == "__main__":
    main()
