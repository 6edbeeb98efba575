"""Does a reward model agree with the demo's verifiers on what a policy draws?

    python -m demo.annotation.sample_agreement --reward runs/demo/reward/export --model demo/base --guidance 2.5

What counts is not how a reward model does on its own test files but whether it is right where RL uses it: on samples of
the policy, in every category, and inside a prompt's group. `--eyes judge` is for what is reported; settings are chosen
with the annotator on validation prompts.

Shapes: P prompts, G members a prompt, C = 3, H = W = 32.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from demo.annotation.policy_samples import sample
from demo.scorers.sets import load_verifier
from demo.scorers.verifiers import Verifier
from demo.scorers.weights import VerifierName
from demo.world.captions import caption
from demo.world.vocabulary import CATEGORIES
from demo.world.world import SPLITS, Split, make_scene
from flow_rl.batches import Prompts
from flow_rl.evaluation.agreement import agreement_by_category
from flow_rl.flow.guidance import Guidance
from flow_rl.rewards.asking import ask
from flow_rl.rewards.base import SCORE_MAX, SCORE_MIN, Samples
from flow_rl.rewards.vlm import VLMReward

SHOWN = ("srcc", "pairwise_accuracy_in_group", "identical_in_group", "count")


def prompts_of(split: Split, count: int, seed: int) -> Prompts:
    """As many prompts of each category, apart from those of annotations and of the prompt files.

    Args:
        split: of their scenes.
        count: prompts of each category.
        seed: which stream.
    """
    scenes = [make_scene(seed, index, split=split, category=c) for index in range(count) for c in CATEGORIES]
    return Prompts(
        ids=tuple(range(len(scenes))),
        texts=tuple(caption(scene, seed, index) for index, scene in enumerate(scenes)),
        categories=tuple(scene.category for scene in scenes),
    )


def agreement(
    reward: VLMReward, verifier: Verifier, prompts: Prompts, images: Tensor
) -> Mapping[str, dict[str, float]]:
    """Agreement of scores with a verifier's accuracy.

    Args:
        reward: of alignment.
        verifier: whose accuracy is taken for the truth.
        prompts: P of them.
        images: (P, G, 3, H, W) in [0, 1].

    Returns:
        figures of `Agreement` by category, and in "all".
    """
    members = images.shape[1]
    texts = [text for text in prompts.texts for _ in range(members)]
    categories = [category for category in prompts.categories for _ in range(members)]
    flat = images.flatten(0, 1)
    scores = ask(reward, Samples(images=flat, prompts=texts, categories=categories), "alignment", section=None)
    truths = SCORE_MIN + (SCORE_MAX - SCORE_MIN) * verifier.check(flat, texts).accuracy
    groups = [row // members for row in range(len(flat))]
    return agreement_by_category(scores, truths, groups, categories)


def table(figures: Mapping[str, dict[str, float]], shown: Sequence[str] = SHOWN) -> str:
    """The figures as a Markdown table, a category a row."""
    lines = ["| category | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    for name, values in figures.items():
        cells = [f"{values[key]:.0f}" if key == "count" else f"{values[key]:.2f}" for key in shown]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, sample, score, print a table a guidance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", required=True, help="export of a reward model")
    parser.add_argument("--model", type=Path, default=Path("demo/base"), help="image model to sample from")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.5], help="of the samples, a table each")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="of the prompts")
    parser.add_argument("--prompts", type=int, default=40, help="of each category, four images a prompt")
    parser.add_argument(
        "--eyes", choices=get_args(VerifierName), default="annotator", help="whose accuracy is the truth"
    )
    parser.add_argument("--direct", action="store_true", help="read the score at once, without a reasoning")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="keeps the samples")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    reward = VLMReward(args.reward, "alignment", reasoning=False if args.direct else None)
    verifier, prompts = load_verifier(args.eyes), prompts_of(args.split, args.prompts, args.seed)
    for scale in args.guidance:
        guidance = Guidance(scale=scale)
        images = sample(args.model, prompts, guidance=guidance, members=4, seed=args.seed, cache_dir=args.cache)
        print(f"\n{args.model}, guidance {scale:g}, {args.split} prompts, by the {args.eyes}\n")
        print(table(agreement(reward, verifier, prompts, images)))


if __name__ == "__main__":
    main()
