"""What sharing and padding text prefixes brings to a rollout and to an update.

    python -m benchmarks.prefixes [--model demo/base] [--threads 1]

Shapes: P prompts, G images a prompt, N = P G samples.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from benchmarks.paired import HEADER, compare
from datamodules.prompts import read_prompts
from flow_rl.batches import Prompts
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.rollout import rollout
from flow_rl.models import Conditioning, ImageModel, load_image_model
from flow_rl.rl.sampling import guided_velocity


def by_length(conditioning: Conditioning) -> list[list[int]]:
    """Indices of the samples whose prompts have the same number of tokens."""
    lengths: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(conditioning.rows.tolist()):
        lengths[conditioning.embeds[row].shape[0]].append(index)
    return list(lengths.values())


@torch.no_grad()
def walk(model: ImageModel, conditioning: Conditioning, noise: Tensor, sigmas: Tensor) -> Tensor:
    """One conditional ODE rollout."""
    return rollout(guided_velocity(model, conditioning, None, Guidance(scale=1.0)), noise, sigmas).latents


def rollouts(model: ImageModel, prompts: Prompts, group: int, rounds: int) -> None:
    """Print how much a rollout gains."""
    conditioning = model.encode(prompts.texts).repeat_interleave(group)
    noise = torch.randn(len(conditioning), *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    sigmas = model.sigmas(8)
    cached = model.cache_prefix(conditioning)
    parts = [(index, model.cache_prefix(conditioning.select(index))) for index in by_length(conditioning)]

    def apart() -> None:
        for index, part in parts:
            walk(model, part, noise[index], sigmas)

    together = compare(apart, lambda: walk(model, cached, noise, sigmas), rounds=rounds)
    print(together.row("rollout: prompts of each length apart, all lengths together"), flush=True)
    kept = compare(
        lambda: walk(model, conditioning, noise, sigmas),
        lambda: walk(model, model.cache_prefix(conditioning), noise, sigmas),
        rounds=rounds,
    )
    print(kept.row("rollout: prefix computed at every step, once"), flush=True)


def updates(model: ImageModel, prompts: Prompts, group: int, rounds: int) -> None:
    """Print how much a forward and backward gains."""
    shared = model.encode(prompts.texts).repeat_interleave(group)
    repeated = prompts.repeat_interleave(group)
    own = model.encode(repeated.texts)
    noise = torch.randn(len(shared), *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))

    def step(conditioning: Conditioning) -> None:
        model.transformer.zero_grad()
        model.velocity(noise, 0.7, conditioning).square().mean().backward()

    print(
        compare(lambda: step(own), lambda: step(shared), rounds=rounds).row(
            "update: a prefix for each sample, one for each prompt"
        ),
        flush=True,
    )


def main() -> None:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    model = load_image_model(args.model, image_size=(32, 32))
    model.transformer.requires_grad_(True)
    prompts = read_prompts("demo/prompts/validation.jsonl").select(list(range(args.prompts)))
    print(HEADER, flush=True)
    rollouts(model, prompts, args.group, args.rounds)
    updates(model, prompts, args.group, args.rounds)


if __name__ == "__main__":
    main()
