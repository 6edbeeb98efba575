"""Trains the judge's networks: ``python -m demo.making.train_judge``.

The judge's recipe is its own: renders of other seeds, other networks (`demo.scorers.judge_reader`,
`demo.scorers.judge_quality`), damage that nothing else in the demo uses (`demo.world.judge_damage`), and an average of
the weights. ``python -m demo.making.train_verifiers --measure-only`` measures it beside the others.

The shipped weights were made in several runs. The last one taught the reader more renders, and nothing else: ``--resume
--renders 5000 --reader-steps 450 --letter-steps 0 --quality-steps 0 --rate 1.5e-3 --seed 204``.

Shapes: N images, C = 3, H = W = 32, S slots.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.making.train_verifiers import (
    RENDER_SEED,
    TRAIN_PER_CATEGORY,
    VALIDATION_PER_CATEGORY,
    Renders,
    load_renders,
    save_weights,
)
from demo.scorers.judge_letters import NO_LETTER, LetterNet, places
from demo.scorers.judge_quality import JudgeQuality
from demo.scorers.judge_reader import LETTER_COUNT, SLOTS, JudgeReader
from demo.scorers.sets import QUALITY_WIDTHS, VERIFIER_WIDTHS
from demo.scorers.weights import ASSETS, load_weights
from demo.world.font import LAYOUT, text_mask
from demo.world.judge_damage import disturb, spoil
from demo.world.render import SIZE, print_card
from demo.world.vocabulary import LETTERS
from demo.world.world import keyed_rng, make_scene

BATCH = 96
_IGNORED = -100
#: cards for the letter network, and the share of them that is empty
_CARDS, _EMPTY, _TEXT_STREAM = 8000, 0.1, 67
_AVERAGE = 0.98
Net = TypeVar("Net", bound=nn.Module)


def targets(renders: Renders) -> Tensor:
    """Index of each slot's value, int64 (N, S); `_IGNORED` in the slots of other categories."""
    rows = []
    for category, attributes in zip(renders.categories, renders.attributes, strict=True):
        shown = attributes | ({LETTER_COUNT: str(len(attributes["text"]))} if "text" in attributes else {})
        rows.append(
            [
                values.index(shown.get(name, "none")) if slot_category == category else _IGNORED
                for (slot_category, name), values in SLOTS.items()
            ]
        )
    return torch.tensor(rows)


def train_reader(network: JudgeReader, renders: Renders, seed: int, steps: int, rate: float) -> JudgeReader:
    """Every slot by cross-entropy, on disturbed renders."""
    wanted = targets(renders)

    def loss_of(reader: JudgeReader, rows: Tensor, generator: torch.Generator) -> Tensor:
        logits = reader(disturb(renders.images[rows].float() / 255, generator))
        losses = [
            F.cross_entropy(found, wanted[rows, column], ignore_index=_IGNORED, reduction="sum")
            for column, found in enumerate(logits.values())
        ]
        return torch.stack(losses).sum() / len(rows)

    return _train("reader", network, loss_of, len(renders.images), seed, steps, rate)


def train_letters(network: LetterNet, seed: int, steps: int, rate: float) -> LetterNet:
    """Letters by cross-entropy, on disturbed cards with texts that are drawn anew; some cards are left empty.

    A tenth of the cards shows no letter at all: a place without one must not be read as one.
    """
    scenes = [make_scene(seed + 1, index, split="train", category="typography") for index in range(_CARDS)]
    rng = keyed_rng(seed, _TEXT_STREAM)
    by_count: dict[int, list[tuple[np.ndarray, str]]] = {count: [] for count in LAYOUT}
    for index, scene in enumerate(scenes):
        count = 1 + index % len(LAYOUT)
        text = "".join(rng.choice(list(LETTERS), size=count))
        empty = rng.random() < _EMPTY
        mask = np.zeros((SIZE, SIZE), dtype=bool) if empty else text_mask(text)
        by_count[count].append((print_card(mask, scene.options), "" if empty else text))
    cards = {c: torch.from_numpy(np.stack([x for x, _ in kept])).permute(0, 3, 1, 2) for c, kept in by_count.items()}
    wanted = {
        c: torch.tensor([[LETTERS.index(x) for x in text] or [NO_LETTER] * c for _, text in kept])
        for c, kept in by_count.items()
    }

    def loss_of(letters: LetterNet, rows: Tensor, generator: torch.Generator) -> Tensor:
        losses = []
        for count, share in zip(LAYOUT, rows.tensor_split(len(LAYOUT)), strict=True):
            looks = places(disturb(cards[count][share].float() / 255, generator), count)
            losses.append(F.cross_entropy(letters(looks).flatten(0, 1), wanted[count][share].flatten()))
        return torch.stack(losses).mean()

    return _train("letters", network, loss_of, _CARDS // len(LAYOUT), seed, steps, rate)


def train_quality(network: JudgeQuality, renders: Renders, seed: int, steps: int, rate: float) -> JudgeQuality:
    """Severity by absolute error, on spoilt renders."""

    def loss_of(score: JudgeQuality, rows: Tensor, generator: torch.Generator) -> Tensor:
        images, severity = spoil(renders.images[rows].float() / 255, generator)
        return (score(images) - (5 - 4 * severity)).abs().mean()

    return _train("quality", network, loss_of, len(renders.images), seed, steps, rate)


def _train(
    name: str,
    network: Net,
    loss_of: Callable[[Net, Tensor, torch.Generator], Tensor],
    count: int,
    seed: int,
    steps: int,
    rate: float,
) -> Net:
    """Adam at a rate that rises for a tenth of the steps and falls as a cosine; the weights' average is kept."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    average, start = deepcopy(network), time.perf_counter()
    for step in range(steps):
        loss = loss_of(network, torch.randint(count, (BATCH,), generator=generator), generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            share = min(_AVERAGE, (1 + step) / (10 + step))
            for kept, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
                kept.lerp_(new, 1 - share) if kept.is_floating_point() else kept.copy_(new)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            left = (time.perf_counter() - start) / (step + 1) * (steps - step - 1) / 60
            print(f"{name}: step {step + 1}/{steps}, loss {loss.item():.3f}, {left:.0f} min left", flush=True)
    return average.eval()


def main() -> None:
    """Train the networks and write their weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader-steps", type=int, default=900, help="0 keeps that network unchanged")
    parser.add_argument("--letter-steps", type=int, default=700)
    parser.add_argument("--quality-steps", type=int, default=900)
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=RENDER_SEED["judge"])
    parser.add_argument("--renders", type=int, default=TRAIN_PER_CATEGORY, help="of each category")
    parser.add_argument("--resume", action="store_true", help="from the judge that is shipped, not from random weights")
    parser.add_argument("--output", type=Path, default=ASSETS, help="directory to write")
    parser.add_argument("--cache", type=Path, default=None, help="directory that keeps the renders between runs")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    reader, score = JudgeReader(width=VERIFIER_WIDTHS["judge"]), JudgeQuality(width=QUALITY_WIDTHS["judge"])
    if args.resume:
        load_weights(reader, "judge.safetensors").train().requires_grad_(True)
        load_weights(score, "quality-judge.safetensors").train().requires_grad_(True)
    counts = {"train": args.renders, "validation": VALIDATION_PER_CATEGORY}
    renders = load_renders(RENDER_SEED["judge"], counts, args.cache)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.reader_steps:
        letters = reader.letters
        reader = train_reader(reader, renders, args.seed, args.reader_steps, args.rate)
        reader.letters = letters  # the reader's loss does not train them
    if args.letter_steps:
        reader.letters = train_letters(reader.letters, args.seed, args.letter_steps, args.rate)
    if args.quality_steps:
        score = train_quality(score, renders, args.seed, args.quality_steps, args.rate)
    save_weights(reader.eval(), args.output / "judge.safetensors")
    save_weights(score.eval(), args.output / "quality-judge.safetensors")


if __name__ == "__main__":
    main()
