"""`python -m flow_rl.evaluation.votes_to_preferences VOTES --left DIR --right DIR`: votes as training data.

People vote on the page of `flow_rl.evaluation.voting`. This command writes their votes as preferences, or with
`--scores` as annotations, for the next round of reward fine-tuning. docs/reward_models.md has the whole round.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_rl.evaluation.vote_files import Key, named_directory, read_votes
from flow_rl.evaluation.vote_outcomes import Tally, held_out, image_scores, tallies
from flow_rl.evaluation.voted_images import VotedImages


def preference_records(found: Sequence[Tally], images: VotedImages, dimension: str) -> dict[int, list[dict[str, Any]]]:
    """Lines of a preference file by prompt id; pairs that no majority decides are left out. Paths are absolute."""
    records: dict[int, list[dict[str, Any]]] = {}
    for tally in found:
        if tally.outcome not in ("first", "second"):
            continue
        names = (tally.first, tally.second) if tally.outcome == "first" else (tally.second, tally.first)
        identifier = f"{tally.key[0]}/{tally.key[1]}/{tally.first}/{tally.second}"
        record: dict[str, Any] = {"id": identifier, "prompt": tally.votes[0].text}
        record |= {key: images.image(name, tally) for key, name in zip(("chosen", "rejected"), names, strict=True)}
        records.setdefault(tally.key[0], []).append(_complete(record, tally, images, dimension))
    return records


def score_records(found: Sequence[Tally], images: VotedImages, dimension: str) -> dict[int, list[dict[str, Any]]]:
    """Lines of an annotation file by prompt id, one an image, without a reasoning. Paths are absolute."""
    of_image: dict[tuple[str, Key], Tally] = {}
    for tally in found:
        of_image |= {(name, tally.key): tally for name in (tally.first, tally.second)}
    records: dict[int, list[dict[str, Any]]] = {}
    for (name, key), score in image_scores(found).items():
        tally = of_image[name, key]
        record = {"id": f"{key[0]}/{key[1]}/{name}", "prompt": tally.votes[0].text, "image": images.image(name, tally)}
        # A word before the id: groups of other annotation files may be numbers.
        record |= {"score": round(score, 6), "reasoning": "", "group": f"votes/{key[0]}"}
        records.setdefault(key[0], []).append(_complete(record, tally, images, dimension))
    return records


def _complete(record: dict[str, Any], tally: Tally, images: VotedImages, dimension: str) -> dict[str, Any]:
    source = images.source(tally.votes[0])
    return record | {"dimension": dimension} | ({} if source is None else {"source": source})


def split(records: Mapping[int, list[dict[str, Any]]], share: float | None) -> list[list[dict[str, Any]]]:
    """Records to train on, and to validate on if a share is given; each prompt is on one side.

    Raises:
        ValueError: a side without a record.
    """
    if share is None:
        return [[record for rows in records.values() for record in rows]]
    sides = [[r for p, rows in records.items() if held_out(p, share) is side for r in rows] for side in (False, True)]
    for side, name in zip(sides, ("training", "validation"), strict=True):
        if not side:
            raise ValueError(
                f"--validation {share} of {len(records)} prompts leaves none for {name}: collect more votes, or give "
                "another share."
            )
    return sides


def write_new(records: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Write JSON Lines to a file that does not exist yet, paths relative to it.

    Raises:
        FileExistsError: the file exists.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    base = output.parent.resolve()
    plain = [{k: os.path.relpath(v, base) if isinstance(v, Path) else v for k, v in r.items()} for r in records]
    with output.open("x", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in plain))


def convert(
    files: Sequence[Path],
    images: VotedImages,
    *,
    dimension: str,
    output: Path,
    scores: bool = False,
    validation: float | None = None,
) -> str:
    """Write the votes of files as preferences or scores.

    Args:
        files: that the voting page wrote, of one or several voters.
        images: of all models that the votes name.
        dimension: what the voters judged, the name of a rubric.
        output: file to write; with `validation`, another is written beside it, `NAME.validation.jsonl`.
        scores: write annotations with scores instead of preferences.
        validation: share of the prompts, in (0, 1), whose votes go to the second file.

    Returns:
        What was read, written and left out, as text.

    Raises:
        ValueError: see `read_votes`, `VotedImages.check` and `split`; an output that exists; nothing to learn from.
    """
    if not re.fullmatch(r"\w+", dimension):
        raise ValueError(f"--dimension is '{dimension}'; a rubric's name has letters, digits and underscores alone.")
    if validation is not None and not 0 < validation < 1:
        raise ValueError(f"--validation is {validation}; it is a share of the prompts, between 0 and 1.")
    outputs = [output] if validation is None else [output, output.with_suffix(f".validation{output.suffix}")]
    for path in outputs:
        if path.exists():
            raise ValueError(f"'{path}' exists, and nothing is overwritten: give another --output, or remove it.")
    votes = read_votes(files)
    for vote in votes:
        images.check(vote)
    found = tallies(votes)
    named = ", ".join(f"'{path}'" for path in files)
    if scores:
        if all(vote.credit == 0.5 for vote in votes):
            raise ValueError(f"{named}: none of {len(votes)} votes prefers an image, so every score would be the same.")
        records = score_records(found, images, dimension)
    else:
        records = preference_records(found, images, dimension)
        if not records:
            raise ValueError(f"{named}: no pair is left of {len(votes)} votes. {_left_out(found)}")
    sides = split(records, validation)
    for path, side in zip(outputs, sides, strict=True):
        write_new(side, path)
    what = "scores" if scores else "pairs"
    lines = [f"Read {len(votes)} votes on {len(found)} pairs of images."]
    lines += [f"Wrote {len(side)} {what} to {path}." for path, side in zip(outputs, sides, strict=True)]
    return "\n".join([*lines, _contradictions(found) if scores else _left_out(found)])


def _left_out(found: Sequence[Tally]) -> str:
    ties, none = (sum(tally.outcome == name for tally in found) for name in ("tie", "none"))
    return f"Left out: {ties} pairs as ties, {none} without a majority. {_contradictions(found)}"


def _contradictions(found: Sequence[Tally]) -> str:
    contradictory = [tally for tally in found if tally.contradictory]
    settled = sum(tally.outcome in ("first", "second") for tally in contradictory)
    return f"Contradictory pairs: {len(contradictory)}, of which {settled} have a majority for one image."


def main(args: list[str] | None = None) -> None:
    """Convert and print the summary."""
    parser = argparse.ArgumentParser(description="Votes as preferences or scores for reward fine-tuning.")
    parser.add_argument("votes", nargs="+", type=Path, metavar="VOTES", help="files of the voting page")
    parser.add_argument("--left", type=named_directory, required=True, metavar="[NAME=]DIR", help="images of one model")
    parser.add_argument(
        "--right", type=named_directory, required=True, metavar="[NAME=]DIR", help="images of the other"
    )
    parser.add_argument(
        "--model", type=named_directory, action="append", default=[], metavar="[NAME=]DIR", help="images of one more"
    )
    parser.add_argument("--dimension", required=True, help="what was judged: the name of a rubric, such as alignment")
    parser.add_argument("--output", type=Path, required=True, help="file to write; it must not exist")
    parser.add_argument("--edits", type=Path, help="edit file, for each edit's source image")
    parser.add_argument("--scores", action="store_true", help="write a score for each image instead of preferences")
    parser.add_argument("--validation", type=float, metavar="SHARE", help="hold out this share of the prompts")
    given = parser.parse_args(args)
    try:
        images = VotedImages([given.left, given.right, *given.model], given.edits)
        told = convert(
            given.votes,
            images,
            dimension=given.dimension,
            output=given.output,
            scores=given.scores,
            validation=given.validation,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(told)


if __name__ == "__main__":
    main()
