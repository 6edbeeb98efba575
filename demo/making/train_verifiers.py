"""Trains and measures the verifiers and quality scores: ``python -m demo.making.train_verifiers``.

The annotator and the monitor see different renders (train and validation splits) and start from different weights;
`demo.making.train_judge` trains the judge, which shares neither network nor recipe with them. All are measured on
renders of the test split, whose attribute combinations none has seen, clean and degraded as a generator might degrade
them. Weights, ``accuracy.json`` and ``ACCURACY.md`` are written again.

Shapes: N images, C = 3, H = W = 32, A attributes with a trained head.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from demo.scorers.convolutional_quality import ConvolutionalQuality
from demo.scorers.convolutional_reader import HEADS, ConvolutionalReader
from demo.scorers.quality import QualityScore
from demo.scorers.sets import QUALITY_WIDTHS, VERIFIER_WIDTHS, load_quality, load_verifier
from demo.scorers.verifiers import Verifier
from demo.scorers.weights import ASSETS
from demo.world.dataset import render_scenes
from demo.world.degrade import corrupt, imitate_generator
from demo.world.vocabulary import CATEGORIES
from demo.world.world import make_scene

RENDER_SEED = {"annotator": 101, "judge": 202, "monitor": 909}
TEST_SEED = 303
TRAIN_PER_CATEGORY, VALIDATION_PER_CATEGORY, TEST_PER_CATEGORY = 1600, 200, 400
BATCH = 128
FLOOR = 0.95  # an attribute that is read worse than this on clean renders must not be in captions
TABLE = Path(__file__).parents[1] / "ACCURACY.md"


@dataclass(frozen=True, kw_only=True)
class Renders:
    """Labelled renders: images uint8 (N, 3, 32, 32), N categories, N attribute dictionaries."""

    images: Tensor
    categories: list[str]
    attributes: list[dict[str, str]]


def load_renders(seed: int, counts: dict[str, int], cache_dir: Path | None) -> Renders:
    """Render ``counts[split]`` scenes of every category."""
    images, categories, attributes = [], [], []
    for split, count in counts.items():
        for category in CATEGORIES:
            data = render_scenes(seed, range(count), split, category=category, cache_dir=cache_dir)
            images.append(torch.from_numpy(data.images).permute(0, 3, 1, 2))
            categories += data.categories
            attributes += [make_scene(seed, i, split=split, category=category).attributes for i in range(count)]
    return Renders(images=torch.cat(images), categories=categories, attributes=attributes)


def _optimizer(module: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3, weight_decay=1e-3)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)


def train_verifier(name: str, renders: Renders, steps: int) -> ConvolutionalReader:
    """Train one verifier's heads on degraded renders by cross-entropy."""
    targets_NA = torch.full((len(renders.categories), len(HEADS)), -100)
    for column, ((category, attribute), values) in enumerate(HEADS.items()):
        for row, (found, attributes) in enumerate(zip(renders.categories, renders.attributes, strict=True)):
            if found == category:
                targets_NA[row, column] = values.index(attributes.get(attribute, "none"))
    labelled = (targets_NA >= 0).any(dim=1)
    images, targets_NA = renders.images[labelled], targets_NA[labelled]
    torch.manual_seed(RENDER_SEED[name])
    generator = torch.Generator().manual_seed(RENDER_SEED[name])
    verifier = ConvolutionalReader(width=VERIFIER_WIDTHS[name])
    optimizer, schedule = _optimizer(verifier, steps)
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        logits = verifier(imitate_generator(images[rows].float() / 255, generator))
        losses = [
            F.cross_entropy(head, target, label_smoothing=0.02, ignore_index=-100)
            for head, target in zip(logits.values(), targets_NA[rows].T, strict=True)
            if (target >= 0).any()
        ]
        loss = torch.stack(losses).sum()
        _step(loss, optimizer, schedule)
        _log(f"{name} verifier", step, steps, loss)
    return verifier.eval()


def train_quality(name: str, renders: Renders, steps: int) -> ConvolutionalQuality:
    """Train one quality score on renders of known severity by squared error."""
    torch.manual_seed(RENDER_SEED[name] + 1)
    generator = torch.Generator().manual_seed(RENDER_SEED[name] + 1)
    score = ConvolutionalQuality(width=QUALITY_WIDTHS[name])
    optimizer, schedule = _optimizer(score, steps)
    for step in range(steps):
        rows = torch.randint(len(renders.images), (BATCH,), generator=generator)
        images, severity = corrupt(renders.images[rows].float() / 255, generator)
        loss = F.mse_loss(score(images), 5 - 4 * severity)
        _step(loss, optimizer, schedule)
        _log(f"{name} quality", step, steps, loss)
    return score.eval()


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


def _log(what: str, step: int, steps: int, loss: Tensor) -> None:
    if (step + 1) % 100 == 0 or step + 1 == steps:
        print(f"{what}: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)


def attribute_accuracy(verifier: Verifier, images: Tensor, renders: Renders) -> dict[str, float]:
    """Share of right readings by ``category.attribute``; images float32 (N, 3, 32, 32) in [0, 1]."""
    right = defaultdict(list)
    for found, category, true in zip(
        verifier.predict(images, renders.categories), renders.categories, renders.attributes, strict=True
    ):
        for name, value in found.items():
            right[f"{category}.{name}"].append(true.get(name, "none") == value)
    return {name: sum(flags) / len(flags) for name, flags in right.items()}


@torch.no_grad()
def measure(verifier: Verifier, score: QualityScore, test: Renders) -> dict[str, dict[str, float]]:
    """Held-out numbers of one set: accuracies, clean and degraded, and how well quality is ranked."""
    clean = test.images.float() / 255
    degraded = imitate_generator(clean, torch.Generator().manual_seed(TEST_SEED))
    corrupted, severity = corrupt(clean, torch.Generator().manual_seed(TEST_SEED + 1))
    scores = score(corrupted)
    return {
        "clean": attribute_accuracy(verifier, clean, test),
        "degraded": attribute_accuracy(verifier, degraded, test),
        "quality": {
            "srcc": float(spearman_corrcoef(scores, -severity)),
            "mean_absolute_error": float((scores - (5 - 4 * severity)).abs().mean()),
            "mean_score_of_clean_renders": float(score(clean).mean()),
        },
    }


def write_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Write ``ACCURACY.md`` from the numbers of all sets."""
    names = list(results)
    lines = [
        "# Accuracy of the demo's verifiers",
        "",
        f"Measured by `python -m demo.making.train_verifiers` on {TEST_PER_CATEGORY} renders a category of the",
        "test split, whose attribute combinations were never trained on. *Degraded*: the same renders moved,",
        "bent, blurred, recoloured and made noisy at random. An attribute under",
        f"{FLOOR:.0%} on clean renders is left out of captions. `background`, `sky`, `card`, `ink` and",
        "`text` are measured exactly by annotator and monitor, and so are the same in both. The judge reads them too.",
        "",
        "| attribute | " + " | ".join(f"{name}, clean | {name}, degraded" for name in names) + " |",
        "|---|" + "---|---|" * len(names),
    ]
    for attribute in results[names[0]]["clean"]:
        cells = [f"{results[name][kind][attribute]:.3f}" for name in names for kind in ("clean", "degraded")]
        lines.append(f"| {attribute} | " + " | ".join(cells) + " |")
    lines += ["", "| quality score | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for number in results[names[0]]["quality"]:
        cells = [f"{results[name]['quality'][number]:.3f}" for name in names]
        lines.append(
            f"| {number.replace('_', ' ').replace('srcc', 'SRCC with severity')} | " + " | ".join(cells) + " |"
        )
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a network's weights in half precision."""
    # Half precision halves the files and changes no reading.
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in module.state_dict().items()
    }
    save_file(state, path)


def main() -> None:
    """Train the chosen sets, measure them, and write weights and table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sets", nargs="+", choices=list(RENDER_SEED), default=list(RENDER_SEED), help="to measure")
    parser.add_argument("--verifier-steps", type=int, default=700)
    parser.add_argument("--quality-steps", type=int, default=500)
    parser.add_argument("--cache", type=Path, default=None, help="directory that keeps the renders between runs")
    parser.add_argument("--measure-only", action="store_true", help="measure the weights that are there")
    arguments = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    record = ASSETS / "accuracy.json"
    results = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    test = load_renders(TEST_SEED, {"test": TEST_PER_CATEGORY}, arguments.cache)
    for name in arguments.sets:
        start = time.perf_counter()
        if not arguments.measure_only and name != "judge":
            counts = {"train": TRAIN_PER_CATEGORY, "validation": VALIDATION_PER_CATEGORY}
            renders = load_renders(RENDER_SEED[name], counts, arguments.cache)
            verifier = train_verifier(name, renders, arguments.verifier_steps)
            save_weights(verifier, ASSETS / f"{name}.safetensors")
            save_weights(train_quality(name, renders, arguments.quality_steps), ASSETS / f"quality-{name}.safetensors")
        results[name] = measure(load_verifier(name), load_quality(name), test)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {results[name]}")
    results = {name: results[name] for name in RENDER_SEED if name in results}
    record.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_table(results)
    weak = [f"{name} {a}" for name, r in results.items() for a, share in r["clean"].items() if share < FLOOR]
    if weak:
        raise SystemExit(f"Under {FLOOR:.0%}, leave out of captions: {', '.join(weak)}")


if __name__ == "__main__":
    main()
