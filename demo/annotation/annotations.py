"""Annotation and preference files of the demo: `python -m demo.annotation.annotations --output runs/demo/annotations`.

These stand in for human annotation. No person has scored anything here:

- alignment: prompts against renders of which every attribute is known, some of them replaced;
- aesthetic, portrait: renders under damage of a known grade;
- instruction_following: edits that are right, half-done, wrong, identity-breaking or damaged, all known;
- and images sampled from the base, judged by the trained annotator (`demo.annotation.policy_samples`), some damaged
further.

`demo.annotation.judgements` turns what is known into scores and reasoning. A split's files hold scenes and prompts of
that split alone: `{split}.jsonl` with `{split}_preferences.jsonl` for renders, `{split}_samples.jsonl` with
`{split}_samples_preferences.jsonl` for samples. Records of a group share their prompt. Renders are a pure function of
(seed, index); another count of groups keeps those that were there.

Shapes: G members of a group, C = 3, H = W = 32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from io import BytesIO
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from demo.annotation.cases import alignment_case, edit_case
from demo.annotation.damage import GRADES, PICTURE, damage
from demo.annotation.groups import Group, damaged_group, edit_group, render_tensor
from demo.annotation.judgements import DAMAGE, judge_alignment
from demo.world.captions import caption
from demo.world.looks import look_of
from demo.world.world import SPLITS, Split, keyed_rng, make_scene
from flow_rl.errors import SettingError
from flow_rl.files import put_files, refuse_foreign_text
from flow_rl.models.images import to_uint8

DIMENSIONS = ("alignment", "aesthetic", "portrait", "instruction_following")
#: groups of renders by dimension; training has more of those whose scores are learnt late
GROUPS = {
    "train": {"alignment": 200, "aesthetic": 300, "portrait": 120, "instruction_following": 300},
    "validation": dict.fromkeys(DIMENSIONS, 30),
    "test": dict.fromkeys(DIMENSIONS, 75),
}
#: groups of samples of a model by dimension: what RL will show to the reward model, so most of what it learns from
SAMPLED = {
    "train": {"alignment": 600, "aesthetic": 150, "portrait": 90, "instruction_following": 250},
    "validation": {"alignment": 50, "aesthetic": 15, "portrait": 10, "instruction_following": 25},
    "test": {"alignment": 100, "aesthetic": 30, "portrait": 20, "instruction_following": 50},
}
MEMBERS = 4
#: of renders; far from the seeds of prompts, verifiers and pre-training
SEED = 5000
_DAMAGE_STREAM = 23


def render_group(dimension: str, seed: int, index: int, *, split: Split, members: int = MEMBERS) -> Group:
    """One group of renders.

    Args:
        dimension: one of `DIMENSIONS`.
        seed: which stream.
        index: which group of the stream.
        split: of every scene in it.
        members: G.
    """
    make = {"alignment": _alignment, "instruction_following": _edits}
    if dimension in make:
        return make[dimension](seed, index, split, members)
    if dimension not in DIMENSIONS:
        raise ValueError(f"Unknown dimension {dimension!r}, expected one of {list(DIMENSIONS)}.")
    return _damaged(dimension, seed, index, split, members)


def _alignment(seed: int, index: int, split: Split, members: int) -> Group:
    case = alignment_case(seed, index, split=split, members=members)
    return Group(
        name=f"alignment-{index}",
        dimension="alignment",
        prompt=case.prompt,
        images=render_tensor(*case.scenes),
        judgements=tuple(judge_alignment(case.request, s.category, s.attributes) for s in case.scenes),
    )


def _edits(seed: int, index: int, split: Split, members: int) -> Group:
    pair, outcomes = edit_case(seed, index, split=split, members=members)
    rng = keyed_rng(seed, index, _DAMAGE_STREAM)
    images = render_tensor(*(outcome.scene for outcome in outcomes))
    for row, outcome in enumerate(outcomes):
        if DAMAGE in outcome.broken:
            images[row], _ = damage(images[row], PICTURE, int(rng.integers(2, GRADES + 1)), rng)
    return edit_group(
        index,
        pair,
        images,
        [outcome.scene.attributes for outcome in outcomes],
        [look_of(outcome.scene) for outcome in outcomes],
        [outcome.broken for outcome in outcomes],
        source=render_tensor(pair.source)[0],
    )


def _damaged(dimension: str, seed: int, index: int, split: Split, members: int) -> Group:
    """One scene, damaged in different grades; G of the five in random order."""
    portrait = dimension == "portrait"
    rng = keyed_rng(seed, index, _DAMAGE_STREAM, 1 + portrait)
    scene = make_scene(seed, int(rng.integers(2**40)), split=split, category="portrait" if portrait else None)
    clean = render_tensor(scene)[0]
    prompt, images = caption(scene, seed, index), clean.expand(members, -1, -1, -1)
    return damaged_group(dimension, f"{dimension}-{index}", prompt, images, [0] * members, rng)


def write_groups(groups: Iterator[Group], directory: Path, name: str) -> int:
    """Write `{name}.jsonl`, `{name}_preferences.jsonl` and the PNG files that they name.

    Returns:
        number of annotations.

    Raises:
        SettingError: a file of somebody else's, or one that was edited since, would be replaced.
    """
    folder = directory / "images" / name
    files: dict[str | Path, bytes] = {}
    records, preferences = [], []
    for group in groups:
        label = f"{name}-{group.name}"  # files are read together
        common: dict[str, Any] = {"prompt": group.prompt, "dimension": group.dimension}
        if group.source is not None:
            common["source"] = _add(files, group.source, folder / f"{group.name}-source.png", directory)
        names = [folder / f"{group.name}-{i}.png" for i in range(len(group.images))]
        paths = [_add(files, image, path, directory) for image, path in zip(group.images, names, strict=True)]
        for i, (path, judged) in enumerate(zip(paths, group.judgements, strict=True)):
            judgement = {"score": judged.score, "reasoning": judged.reasoning}
            record = {"id": f"{label}-{i}", "image": path, **common, **judgement, "group": label}
            records.append(record)
        preferences += [
            {"id": f"{label}-{i}-{j}", **common, "chosen": paths[i], "rejected": paths[j]}
            for i, j in permutations(range(len(paths)), 2)
            if group.judgements[i].score > group.judgements[j].score
        ]
    for suffix, rows in (("", records), ("_preferences", preferences)):
        files[directory / f"{name}{suffix}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    put_files(files, durable=False)
    return len(records)


def _add(files: dict[str | Path, bytes], image: Tensor, path: Path, directory: Path) -> str:
    buffer = BytesIO()
    Image.fromarray(to_uint8(image[None])[0]).save(buffer, "PNG")
    files[path] = buffer.getvalue()
    return str(path.relative_to(directory))


def main() -> None:
    """Parse the command line, make everything, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--count", type=float, default=1.0, help="scales the number of groups")
    parser.add_argument("--renders", type=float, default=1.0, help="scales groups of renders once more; 0: none")
    parser.add_argument("--sampled", type=float, default=1.0, help="scales groups of samples once more; 0: none")
    parser.add_argument("--model", type=Path, default=Path("demo/base"), help="the image model to sample from")
    parser.add_argument("--reward", help="export of a reward model: annotate what it reads worst")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="keeps the samples")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    try:  # before anything is drawn
        for name in (f"{split}{kind}" for split in SPLITS for kind in ("", "_samples")):
            refuse_foreign_text(args.output / f"{name}.jsonl")
            refuse_foreign_text(args.output / f"{name}_preferences.jsonl")
    except SettingError as error:
        parser.error(str(error))
    # the image model's libraries take seconds to import
    from demo.annotation.hard_cases import hardest
    from demo.annotation.policy_samples import sampled_groups

    for split in SPLITS:
        start = time.perf_counter()
        groups = [(d, i) for d, most in GROUPS[split].items() for i in range(round(most * args.count * args.renders))]
        made = (render_group(d, SEED + args.seed, i, split=split) for d, i in groups)
        count = write_groups(made, args.output, split)
        counts = {d: round(most * args.count * args.sampled) for d, most in SAMPLED[split].items()}
        sampled = 0
        if any(counts.values()):
            more = 1 if args.reward is None else 2
            drawn = sampled_groups(
                args.model,
                SEED + args.seed,
                {dimension: more * wanted for dimension, wanted in counts.items()},
                split=split,
                members=MEMBERS,
                cache_dir=args.cache,
            )
            if args.reward is not None:
                drawn = hardest(drawn, args.reward, counts)
            sampled = write_groups(iter(drawn), args.output, f"{split}_samples")
        print(f"{split}: {count} renders, {sampled} samples, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
