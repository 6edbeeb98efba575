"""What every module that trains an image generator shares: the trained transformer, `validate`, `test`, `predict`.

The same prompts always get the same noise, so two checkpoints differ by their weights alone. The ranks share every
batch out and all get the whole of it back: callbacks and metrics see the same on every rank as on one.

Shapes: P prompts, M images a prompt, N = P M samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from flow_rl.batches import Captioned, Prompts, TaskBatches, labels
from flow_rl.distributed.shares import Share
from flow_rl.errors import check_above_zero
from flow_rl.models import ImageModel
from flow_rl.models.adapters import LoraSettings, add_lora
from flow_rl.models.loading import peek_sigmas
from flow_rl.models.memory import FrozenDtype
from flow_rl.models.workload import Generator
from flow_rl.names import check_names
from flow_rl.planning.stage import Profile
from flow_rl.rewards import Reward
from flow_rl.rewards.asking import JUDGE
from flow_rl.rl.phases import PhaseClock
from flow_rl.rl.sampling import Sampler
from flow_rl.rl.scoring import score_share
from lightning_modules.base import MAX_SKIPPED, TrainedModule, check_optimizer


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Images of a batch of prompts with their scores, the same on every rank, all on the host.

    Attributes:
        prompts: one entry an image, length N.
        images: in [0, 1], shape (N, 3, H, W).
        scores: raw scores (N,) by name of each scorer that was asked; NaN where one could not score.
    """

    prompts: Prompts
    images: Tensor
    scores: Mapping[str, Tensor]


class ImageModule(TrainedModule):
    """Trains a generator's transformer by manual optimization, and draws images of fixed prompts from fixed noise.

    A subclass passes on what it does not take itself, sets `rewards`, and makes `model` and `sampler` in
    `configure_model`.

    Args:
        model_path: the base, a directory in the diffusers layout.
        image_size: height and width in pixels.
        optimizer: of the trainable weights.
        lr_scheduler: stepped after every optimizer step; None keeps the rate.
        judges: scorers used by `test` alone, by name. Never part of training.
        lora: train an adapter of this kind; None trains all the transformer's weights.
        frozen_dtype: of weights that are not trained: the text encoder, teachers and, under an adapter, the
            transformer.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        compile_blocks: compile the transformer's blocks (`torch.compile`). The first iteration takes minutes longer.
        gradient_clip: largest gradient norm.
        max_skipped: stop the run after so many updates in a row with a loss or gradient that is not finite.
        test_members: images a prompt in `test` and `predict`.
        max_prompt_tokens: refuse longer prompts, before anything is loaded; None takes the family's limit (512 for
            Qwen-Image's text-to-image, which reads no more, and 1024 for others).
        check_rewards: let every reward score a few samples before training (`callbacks.reward_trial`); false for
            services that cost too much.
        seed: of all that is drawn at random: noise, windows, noise levels, states.

    Attributes:
        model: the generator; None before `configure_model`.
        sampler: draws images in the module's own way.
        rewards: scorers of validation and `test`, by name.
        iteration: training steps done.
    """

    sampler: Sampler
    rewards: dict[str, Reward]
    clock: PhaseClock
    #: images a prompt in `validate`
    val_members = 1

    def __init__(
        self,
        *,
        model_path: str,
        image_size: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        judges: dict[str, Reward] | None = None,
        lora: LoraSettings | None = None,
        frozen_dtype: FrozenDtype = "float32",
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        gradient_clip: float = 1.0,
        max_skipped: int = MAX_SKIPPED,
        test_members: int = 1,
        max_prompt_tokens: int | None = None,
        check_rewards: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Everything that can be refused is refused while modules are built, before a model loads.
        check_optimizer(optimizer, lr_scheduler)
        check_above_zero("model", gradient_clip=gradient_clip, max_skipped=max_skipped, test_members=test_members)
        if max_prompt_tokens is not None:
            check_above_zero("model", max_prompt_tokens=max_prompt_tokens)
        check_names("model.judges", judges or {})
        self.model_path, self.image_size = model_path, image_size
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.judges = judges or {}
        self.lora = lora
        self.frozen_dtype: FrozenDtype = frozen_dtype
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile_blocks
        self.gradient_clip, self.max_skipped = gradient_clip, max_skipped
        self.test_members = test_members
        self.max_prompt_tokens = max_prompt_tokens
        self.check_rewards = check_rewards
        self.seed = seed
        self.clock = PhaseClock()
        self.iteration = 0
        self.model: ImageModel | None = None

    def sigmas(self, num_steps: int) -> Tensor:
        """The schedule (T + 1,) of the generator, before it loads."""
        return peek_sigmas(self.model_path, max(num_steps, 1), image_size=self.generator.size)

    # ----------------------------------------------------------------- training

    def choose_trained(self, model: ImageModel) -> None:
        """Say which of the transformer's weights are trained, and add the adapter if that is what is."""
        if self.lora is None:
            model.transformer.requires_grad_(True)
            return
        with torch.random.fork_rng(devices=[]):
            # The same adapter on every rank and after every restart. Only the CPU's generator matters (`add_lora`).
            torch.default_generator.manual_seed(self.seed)
            add_lora(model.transformer, **vars(self.lora), targets=model.lora_targets)

    @property
    @override
    def replaced_components(self) -> tuple[str, ...]:
        return () if self.lora is not None else ("transformer",)

    @override
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.transformer.parameters() if p.requires_grad]

    @property
    def generator(self) -> Generator:
        """What is known of the generator before it loads."""
        return Generator(
            model_path=self.model_path,
            image_size=self.image_size,
            lora=self.lora,
            frozen_dtype=self.frozen_dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            max_prompt_tokens=self.max_prompt_tokens,
        )

    def limit_prompts(self, model: ImageModel) -> None:
        """Make a loaded generator take prompts as long as this run allows."""
        if self.max_prompt_tokens is not None:
            model.max_prompt_tokens = self.max_prompt_tokens

    @override
    def profile(self) -> Profile:
        return replace(super().profile(), generator=self.generator)

    def export(self, path: str | Path) -> None:
        """Write the trained generator in the diffusers layout; a student is sampled at guidance 1."""
        self.model.save_pretrained(path)

    # ----------------------------------------------------------------- drawing

    @override
    def transfer_batch_to_device(
        self, batch: Prompts | TaskBatches | Captioned, device: torch.device, dataloader_idx: int
    ) -> Any:
        # Lightning's own transfer refuses frozen dataclasses. In an evaluation a rank moves no more than its share.
        return batch.to(device) if self.trainer.training else batch

    def asks(self, name: str, task: str) -> bool:
        """Whether the scorer of that name is asked about samples of a task."""
        return True

    def draw(
        self, batch: Prompts, scorers: Mapping[str, Reward], members: int, *, sampler: Sampler | None = None
    ) -> Drawn:
        """`members` images a prompt, scored by every scorer that is asked about their task.

        Every rank draws and scores its share of the batch, and must be given the same batch.

        Args:
            batch: P prompts.
            scorers: by name.
            members: images a prompt.
            sampler: how to draw; None is the module's own way.
        """
        self.model.transformer.eval()
        device, share = self.compute_device, Share.of(len(batch))
        mine = batch.select(list(share.rows)).to(device)
        images = (sampler or self.sampler).images(self.model, mine, members=members)
        asked = {name: scorer for name, scorer in scorers.items() if self.asks(name, batch.task)}
        columns = score_share(share, asked, mine, images.to(device)).unbind(dim=1)
        return Drawn(
            prompts=batch.to(torch.device("cpu")).repeat_interleave(members),
            images=share.gather(images),
            scores=dict(zip(asked, columns, strict=True)),
        )

    # ----------------------------------------------------------------- validate

    @override
    def on_validation_epoch_start(self) -> None:
        self._means: dict[str, MeanMetric] = {}

    @override
    def validation_step(self, batch: Prompts, batch_idx: int) -> dict[str, Drawn]:
        """Draw and score a batch; returns the images by label, empty for the module's own way to draw."""
        drawn = self.draw(batch, self.rewards, self.val_members)
        self._collect(drawn)
        return {"": drawn}

    def _collect(self, drawn: Drawn) -> None:
        prompts = drawn.prompts
        tasks = [prompts.task] * len(prompts)
        names, means = labels(prompts.categories, tasks), labels(["mean"] * len(prompts), tasks)
        for name, scores in drawn.scores.items():
            for label in sorted(set(names)):
                index = [i for i, other in enumerate(names) if other == label]
                for key in (f"{name}/{label}", f"{name}/{means[0]}"):
                    metric = self._means.setdefault(key, MeanMetric(nan_strategy="ignore").to(self.compute_device))
                    metric.update(scores[index].to(self.compute_device))

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{key}": metric.compute() for key, metric in sorted(self._means.items())})

    # ----------------------------------------------------------------- test

    @override
    def on_test_epoch_start(self) -> None:
        self._means = {}
        self._rows: list[dict[str, Any]] = []

    @override
    def test_step(self, batch: Prompts, batch_idx: int) -> Drawn:
        scorers = self.rewards | {f"{JUDGE}{name}": judge for name, judge in self.judges.items()}
        drawn = self.draw(batch, scorers, self.test_members)
        self._collect(drawn)
        for i, (identifier, text, category) in enumerate(
            zip(drawn.prompts.ids, drawn.prompts.texts, drawn.prompts.categories, strict=True)
        ):
            row = {"id": identifier, "prompt": text, "category": category, "member": i % self.test_members}
            row["task"] = drawn.prompts.task
            # NaN is not JSON: a score that could not be given is null.
            scores = {name: None if torch.isnan(s[i]) else round(float(s[i]), 6) for name, s in drawn.scores.items()}
            self._rows.append(row | {"scores": scores})
        return drawn

    @override
    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{key}": metric.compute() for key, metric in sorted(self._means.items())})
        if self.trainer.log_dir is not None and self.trainer.is_global_zero:
            self.write_rows("test_scores.jsonl", self._rows)

    # ----------------------------------------------------------------- predict

    @override
    def predict_step(self, batch: Prompts, batch_idx: int) -> Drawn:
        return self.draw(batch, {}, self.test_members)
