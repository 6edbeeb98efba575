"""Trains and measures the avatar embedder: ``python -m demo.making.train_identity``.

Each person of the training part is a class, seen in several pictures; the loss is ArcFace's (Deng et al. 2019,
arXiv 1801.07698), so that an embedding lies nearer to its own person than to any other by a margin. A second head
learns what is a portrait. Measured on people that were never trained on; ``IDENTITY.md`` is written again.

Shapes: N images, C = 3, H = W = 32, D = 64, P people.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from demo.making.measure_identity import measure, people, pixels, write_table
from demo.scorers.identity import WEIGHTS, IdentityNet, vary
from demo.world.degrade import break_patches, imitate_generator
from demo.world.vocabulary import CATEGORIES
from demo.world.world import keyed_rng, make_scene

SEED = 606
PEOPLE, PICTURES = 500, 8
OTHERS_PER_CATEGORY = 250
BATCH, STEPS = 128, 1100
SCALE, MARGIN = 20.0, 0.3  # ArcFace's s and m (radians)
MARGIN_RAMP = 0.3  # of the steps, over which the margin grows from 0: all of it from the start hardly trains
CENTER_SCALE = 0.1  # of the initial centers: directions of short vectors turn faster
NO_PORTRAIT_SHARE = 0.25  # of a batch, beside it


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """Portraits uint8 (N, 3, 32, 32) with their people int64 (N,), and images of other things."""

    portraits: Tensor
    labels: Tensor
    others: Tensor


def training_images() -> TrainingImages:
    """Render the training part."""
    scenes, labels = [], []
    for label, scene in enumerate(people(SEED, PEOPLE, held_out=False)):
        rng = keyed_rng(SEED, label)
        scenes += [scene] + [vary(scene, rng) for _ in range(PICTURES - 1)]
        labels += [label] * PICTURES
    others = [
        make_scene(SEED, index, split="train", category=category)
        for category in CATEGORIES
        if category != "portrait"
        for index in range(OTHERS_PER_CATEGORY)
    ]
    return TrainingImages(portraits=pixels(scenes), labels=torch.tensor(labels), others=pixels(others))


def without_face(others: Tensor, portraits: Tensor, generator: Generator) -> Tensor:
    """Images that show no face, (N, 3, 32, 32): other things, portraits in pieces, single colours, noise.

    Args:
        others: renders of other categories, N of them, in [0, 1].
        portraits: N portraits, in [0, 1].
        generator: what each image becomes.
    """
    n = len(others)
    broken = break_patches(portraits, torch.rand(n, generator=generator) * 0.3 + 0.7, generator)
    flat = torch.rand(n, 3, 1, 1, generator=generator).expand_as(others)
    noisy = flat + 0.3 * torch.randn(others.shape, generator=generator)
    kind = torch.rand(n, 1, 1, 1, generator=generator)
    images = torch.where(kind < 0.6, imitate_generator(others, generator), broken)
    return torch.where(kind > 0.9, torch.where(kind > 0.95, noisy, flat), images).clamp(0, 1)


def arcface_logits(embeddings_ND: Tensor, centers_PD: Tensor, labels_N: Tensor, margin: float) -> Tensor:
    """ArcFace's logits (N, P): ``s cos(theta + m)`` for an image's own person, ``s cos(theta)`` for all others."""
    cosines = (embeddings_ND @ F.normalize(centers_PD, dim=-1).T).clamp(-1 + 1e-6, 1 - 1e-6)
    own = F.one_hot(labels_N, len(centers_PD)).bool()
    return SCALE * torch.where(own, torch.cos(torch.acos(cosines) + margin), cosines)


def train(data: TrainingImages, steps: int) -> IdentityNet:
    """Train both heads on degraded renders."""
    torch.manual_seed(SEED)
    generator = Generator().manual_seed(SEED)
    net = IdentityNet().to(memory_format=torch.channels_last)  # twice as fast on a CPU
    centers = nn.Parameter(CENTER_SCALE * torch.randn(int(data.labels.max()) + 1, 64))
    optimizer = torch.optim.AdamW([*net.parameters(), centers], lr=4e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    n_others = int(BATCH * NO_PORTRAIT_SHARE)
    is_portrait = torch.arange(BATCH + n_others) < BATCH
    for step in range(steps):
        rows = torch.randint(len(data.portraits), (BATCH,), generator=generator)
        clean = data.portraits[rows].float() / 255
        other_rows = torch.randint(len(data.others), (n_others,), generator=generator)
        others = without_face(data.others[other_rows].float() / 255, clean[:n_others], generator)
        images = torch.cat([imitate_generator(clean, generator), others])
        embeddings, portrait = net(images.contiguous(memory_format=torch.channels_last))
        labels, margin = data.labels[rows], MARGIN * min(1.0, step / (MARGIN_RAMP * steps))
        who = F.cross_entropy(arcface_logits(embeddings[:BATCH], centers, labels, margin), labels)
        what = F.binary_cross_entropy_with_logits(portrait, is_portrait.float())
        optimizer.zero_grad()
        (who + what).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}: identity {who.item():.3f}, portrait {what.item():.3f}", flush=True)
    return net.eval().requires_grad_(False)


def main() -> None:
    """Train, measure on held-out people, and write weights and table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    start = time.process_time()  # not the clock's: the machine may be busy with other work
    data = training_images()
    rendered = len(data.portraits) + len(data.others)
    print(f"rendered {rendered} images in {time.process_time() - start:.0f} s", flush=True)
    net = train(data, arguments.steps)
    seconds = time.process_time() - start
    numbers = measure(net)
    # Half precision halves the file and changes no reading.
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
    anchors = {"different": f"{numbers.different.mean:.3f}", "same": f"{numbers.same.mean:.3f}"}
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(state, WEIGHTS, metadata=anchors)
    write_table(numbers, seconds=seconds)
    print(f"{seconds:.0f} s, {numbers}")


if __name__ == "__main__":
    main()
