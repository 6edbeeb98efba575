"""How much of a slow reward's time hides behind the rest of a training step?

    python -m benchmarks.async_reward --reward-seconds 1 --pieces 1 2 4 8
    python -m benchmarks.async_reward --reward-seconds 1 --generator-seconds 1

The reward waits in a thread of its own, in proportion to the images it is given, so that one iteration's take
`--reward-seconds` however they are cut. Odd iterations are scored that slowly, even ones at once: both are timed in
turns, in one run. Reported is the slow iteration's time over the larger of the two things it consists of: (rollout and
update), and the reward.

In one piece everything waits for the reward. In m pieces, the later ones roll out and the earlier ones' gradients are
computed while scores are outstanding. What cannot overlap without stale data is the first piece's rollout before the
first score and the last piece's update after the last one: about 1/m of (rollout and update).

With `--generator-seconds`, rollout and update wait as well, half of it each, in place of a model: that measures the
order in which a step does things, and nothing else, on whatever machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from functools import partial
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor, nn

from datamodules import PromptDataModule
from flow_rl.batches import Prompts
from flow_rl.flow.rollout import Trajectory
from flow_rl.flow.windows import WindowSettings
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.background import ThreadedReward
from flow_rl.rl.objectives import NFT, Rollout
from flow_rl.rl.settings import RolloutSettings
from lightning_modules import GRPOPolicy


class SlowBrightness(Reward):
    """Mean brightness on 1..5, `delay_s` seconds an image later."""

    def __init__(self) -> None:
        self.delay_s = 0.0

    def score(self, samples: Samples) -> Tensor:
        time.sleep(self.delay_s * len(samples))
        return 1 + 4 * samples.images.mean(dim=(1, 2, 3))


class WaitingPolicy(GRPOPolicy):
    """A policy whose rollouts and updates take a given time an image, and do nothing."""

    sample_s = 0.0

    def configure_model(self) -> None:
        self.model = nn.Module()
        self.model.transformer = nn.Linear(1, 1)

    def roll_out(self, prompts: Prompts) -> Rollout:
        count = len(prompts) * self.rollout_settings.group_size
        with self.clock.phase("rollout"):
            time.sleep(self.sample_s / 2 * count)
        nothing = torch.zeros(count, 1, 1)
        return Rollout(
            settings=self.rollout_settings,
            prompts=prompts,
            images=torch.rand(count, 3, 8, 8),
            trajectory=Trajectory(latents=nothing, steps=(), states=nothing[None], next_states=nothing[None]),
            sigmas=torch.zeros(0),
            conditioning=None,  # nothing evaluates the model
            unconditional=None,
            members=tuple(range(self.rollout_settings.group_size)) * len(prompts),
            iteration=self.iteration,
            seed=self.seed,
        )

    def prepare(self, rollout: Any, update: int) -> dict[str, Tensor]:
        return {}

    def accumulate_gradients(self, rollout: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        time.sleep(self.sample_s / 2 * len(rollout))
        return {"loss": torch.zeros(())}


class Turns(Callback):
    """Makes every other iteration's reward slow, and times them all."""

    def __init__(self, reward: SlowBrightness, delay_s: float) -> None:
        self.reward, self.delay_s = reward, delay_s
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.reward.delay_s = self.delay_s * (batch_idx % 2)
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 1:  # the first of each warms up
            self.seconds[bool(batch_idx % 2)].append(time.perf_counter() - self.start)


def measure(options: argparse.Namespace, pieces: int) -> tuple[float, float]:
    """Median seconds of an iteration with a reward that answers at once, and with the slow one."""
    reward = SlowBrightness()
    samples = options.prompts * options.group_size
    kind = GRPOPolicy if options.generator_seconds is None else WaitingPolicy
    policy = kind(
        model_path=options.model,
        image_size=32,
        rewards={"brightness": ThreadedReward(reward)},
        optimizer=partial(torch.optim.AdamW, lr=1e-5),
        rollout=RolloutSettings(
            num_steps=options.steps,
            group_size=options.group_size,
            transition="ode",
            window=WindowSettings(count=1, fraction=1.0),
            batch_size=max(options.group_size, samples // pieces),
        ),
        objective=NFT(old_decay=0.0, reference_weight=0.0, micro_batch_size=samples),
    )
    if isinstance(policy, WaitingPolicy):
        policy.sample_s = options.generator_seconds / samples
    files = {f"{split}_file": f"demo/prompts/{split}.jsonl" for split in ("train", "validation", "test")}
    turns = Turns(reward, options.reward_seconds / samples)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2 + 2 * options.rounds,
        callbacks=[turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(policy, PromptDataModule(**files, prompts_per_step=options.prompts))
    return statistics.median(turns.seconds[False]), statistics.median(turns.seconds[True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward-seconds", type=float, default=1.0, help="what the reward takes for an iteration")
    parser.add_argument("--generator-seconds", type=float, help="let rollout and update wait so long, without a model")
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 2, 4, 8], help="how an iteration is cut")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="denoising steps")
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each kind")
    parser.add_argument("--model", default="demo/base")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # Lightning's advice on workers and the like
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(
        "| pieces | rollout and update | reward | step | step / larger of the two |\n|---|---|---|---|---|", flush=True
    )
    for pieces in options.pieces:
        work, step = measure(options, pieces)
        ratio = step / max(work, options.reward_seconds)
        print(f"| {pieces} | {work:.2f} s | {options.reward_seconds:.2f} s | {step:.2f} s | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
