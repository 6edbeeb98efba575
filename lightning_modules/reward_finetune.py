"""A vision-language model becomes a scorer: pointwise with reasoning, or pairwise.

The score is `R = sum_s s p(s)` over the five digits at the position where the answer states it; pointwise training
minimises `CE(reasoning, digit) + lambda (R - y)^2`, pairwise `-log sigmoid(R_w - R_l)` (arXiv 2606.27608, section 2).

Shapes: N images of a batch, A predictions of the assistant's turn, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from typing_extensions import override

from datamodules.annotation_files import AnnotationBatch, LoadedAnnotation
from datamodules.preferences import PreferenceBatch
from flow_rl.distributed.gradients import world_size
from flow_rl.distributed.sharding import gather, release
from flow_rl.errors import check_above_zero
from flow_rl.evaluation.agreement import Agreement
from flow_rl.flow.noise import Stream, keyed_generator
from flow_rl.models.adapters import LoraSettings
from flow_rl.models.base_digest import WHOLE
from flow_rl.models.shard_units import vlm_unit
from flow_rl.models.vision_language import (
    add_vlm_lora,
    check_vlm_path,
    freeze_vision,
    load_empty_vlm,
    load_vlm,
    save_plain,
)
from flow_rl.models.whole import first_rank
from flow_rl.rewards.conversation import Answer, Question, training_inputs
from flow_rl.rewards.finetune_settings import RewardObjective, check_reward_data, check_reward_settings
from flow_rl.rewards.losses import pairwise_loss, pointwise_loss
from flow_rl.rewards.reading import Answers, ReadingSettings, ScoreReader
from flow_rl.rewards.readout import nearest_digit
from flow_rl.rewards.rubrics import RUBRIC_DIRECTORY, load_rubrics
from flow_rl.rewards.spec import RewardSpec
from flow_rl.rewards.vlm import DTYPES
from lightning_modules.base import TrainedModule, check_optimizer
from lightning_modules.length_buckets import check_parts, mean_of_parts, parts_by_length
from strategies import distribute, is_sharded_run

#: metrics also averaged over the dimensions
_AVERAGED = ("srcc", "plcc", "mse", "pairwise_accuracy", "parse_rate")


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """A batch with the answers to it; what `validation_step` and `test_step` return.

    Attributes:
        examples: the annotations with their images.
        answers: the model's, in the same order.
    """

    examples: Sequence[LoadedAnnotation]
    answers: Answers


class RewardFinetune(TrainedModule):
    """Fine-tunes Qwen3-VL or Qwen2.5-VL on human scores or preferences.

    Args:
        model_path: where to start, a directory that `save_pretrained` of transformers wrote.
        optimizer: of the trainable weights.
        lr_scheduler: stepped after every optimizer step; None keeps the rate.
        rubrics: name or path of a rubric by dimension; None takes the shipped one of every name.
        objective: what an update minimises.
        reading: how validation, and by default the exported reward, make and read answers.
        lora: train an adapter of this kind; None trains all weights.
        quantization: `nf4` holds the frozen linear layers in 4 bits (QLoRA).
        dtype: of the weights as loaded; an adapter has float32 weights and computes in this dtype.
        train_vision: false leaves the vision tower as it is.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        gradient_clip: largest gradient norm.
        length_parts: forwards of a step, each on images of similar length: less padding, the same loss.
        seed: of adapters, dropout and of which examples are answered without reasoning.
    """

    def __init__(
        self,
        model_path: str,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        rubrics: dict[str, str] | None = None,
        objective: RewardObjective = RewardObjective(),  # noqa: B008  (frozen)
        reading: ReadingSettings = ReadingSettings(),  # noqa: B008
        lora: LoraSettings | None = None,
        quantization: Literal["none", "nf4"] = "none",
        dtype: Literal["float32", "bfloat16"] = "float32",
        train_vision: bool = True,
        gradient_checkpointing: bool = False,
        gradient_clip: float = 1.0,
        length_parts: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Everything that can be refused is refused here, before a model loads.
        check_vlm_path(model_path)
        shipped = {path.stem: path.stem for path in sorted(RUBRIC_DIRECTORY.glob("*.yaml"))}
        self.rubrics = load_rubrics(shipped if rubrics is None else rubrics)
        check_reward_settings(objective, reading, lora=lora, quantization=quantization, dtype=dtype)
        check_optimizer(optimizer, lr_scheduler)
        check_above_zero("model", gradient_clip=gradient_clip, length_parts=length_parts)
        self.model_path = model_path
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.objective = objective
        self.reading = reading
        self.lora = lora
        self.quantization = quantization
        self.dtype_name = dtype
        self.train_vision = train_vision
        self.gradient_checkpointing = gradient_checkpointing
        self.gradient_clip = gradient_clip
        self.length_parts = length_parts
        self.seed = seed
        self.model: PreTrainedModel | None = None
        self.processor: ProcessorMixin | None = None
        self.agreement = nn.ModuleDict({dimension: Agreement() for dimension in self.rubrics})
        #: metrics of the last validation, by dimension and name
        self.validation: dict[str, dict[str, float | None]] = {}

    # ----------------------------------------------------------------- set-up

    @property
    @override
    def replaced_components(self) -> tuple[str, ...]:
        return () if self.lora is not None or not self.train_vision else (WHOLE,)

    @property
    @override
    def weight_settings(self) -> dict[str, str]:
        return {"quantization": self.quantization}

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_reward_data(self.trainer.datamodule, self.objective, self.rubrics)
        check_parts(self.trainer.datamodule, self.length_parts, self.trainer.world_size)

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        dtype, reader = DTYPES[self.dtype_name], None
        if is_sharded_run(self):
            if self.quantization != "none":
                raise ValueError(
                    "model.quantization can't be sharded: train on whole weights (configs/strategy/ddp.yaml)."
                )
            model, processor, reader = load_empty_vlm(self.model_path, dtype=dtype)
        else:
            model, processor = load_vlm(self.model_path, dtype=dtype, nf4=self.quantization == "nf4")
        if self.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)  # the same adapter on every rank and after every restart
                add_vlm_lora(model, **vars(self.lora), vision=self.train_vision)
        else:
            model.requires_grad_(True)
            if not self.train_vision:
                freeze_vision(model)
        if self.gradient_checkpointing:
            # Without re-entry, frozen embeddings need no gradient for the layers above them to get theirs.
            model.activation_checkpointing_enable({"use_reentrant": False})
        distribute(self, model, (vlm_unit(model),), reader)
        self.model, self.processor = model, processor
        self.reader = ScoreReader(model, processor, self.reading)

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # pictures go through the processor first

    # ----------------------------------------------------------------- training

    @override
    def training_step(self, batch: AnnotationBatch | PreferenceBatch, batch_idx: int) -> Tensor:
        self.model.train()
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        generator = keyed_generator(seed=self.seed, step=number, sample_id=0, member=0, stream=Stream.DROPOUT)
        if self.lora is not None and self.lora.dropout > 0:
            # torch's global generator is in no checkpoint: a resumed run must drop the same inputs.
            torch.manual_seed(int(torch.randint(1 << 31, (), generator=generator)) + self.global_rank)
        # drawn for the batch of all ranks, so that it is the same however many there are
        size, rank = len(batch), self.global_rank
        direct = torch.rand(size * world_size(), generator=generator) < self.objective.direct_share
        mine = direct[rank * size : (rank + 1) * size].tolist()
        parts = parts_by_length(batch, self.rubrics, mine, self.length_parts)
        loss, metrics = mean_of_parts([self.loss(*part) for part in parts], [len(part) for part, _ in parts])
        self.note_loss(loss)
        values = {"loss": loss.detach()} | {f"train/{name}": value for name, value in metrics.items()}
        self.log_means(values, batch_size=size * world_size())
        return loss

    def loss(
        self, batch: AnnotationBatch | PreferenceBatch, direct: Sequence[bool]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch under the objective.

        Args:
            batch: scored images or pairs, as the objective wants.
            direct: for each image or pair, whether its answer is the score alone; without a reasoning it always is.
        """
        if isinstance(batch, PreferenceBatch):
            examples = (*batch.chosen, *batch.rejected)
            # Both images of a pair get one kind of answer. Otherwise the kind would tell which one was preferred.
            direct = [skip or not reasoned for skip, reasoned in zip(direct, batch.reasoned, strict=True)] * 2
            digits: list[int | None] = [None] * len(examples)
        else:
            examples = batch.examples
            digits = [nearest_digit(e.annotation.score) for e in examples]
        answers = [
            Answer(reasoning="" if skip else e.annotation.reasoning, digit=digit)
            for e, digit, skip in zip(examples, digits, direct, strict=True)
        ]
        inputs = training_inputs(self.processor, self.questions(examples), answers)
        moved = {k: v.to(self.compute_device) if isinstance(v, Tensor) else v for k, v in inputs.model_inputs.items()}
        logits = self.model(**moved, use_cache=False).logits
        read = (logits, inputs.labels.to(self.compute_device), inputs.digit_index.to(self.compute_device))
        weight = self.objective.cross_entropy
        if isinstance(batch, PreferenceBatch):
            return pairwise_loss(*read, self.reader.digits, cross_entropy=weight)
        return pointwise_loss(
            *read,
            batch.scores.to(self.compute_device),
            self.reader.digits,
            cross_entropy=weight,
            regression=self.objective.regression,
        )

    def questions(self, examples: Sequence[LoadedAnnotation]) -> list[Question]:
        """What the model is asked about each image."""
        return [
            Question(
                rubric=self.rubrics[e.annotation.dimension],
                prompt=e.annotation.prompt,
                image=e.image,
                source=e.source,
            )
            for e in examples
        ]

    # ----------------------------------------------------------------- validate and test

    @override
    def validation_step(self, batch: AnnotationBatch, batch_idx: int) -> ScoredBatch:
        return self._score(batch)

    @override
    def on_validation_epoch_start(self) -> None:
        gather(self.model)  # ranks answer different questions, in different numbers of forwards
        for metric in self.agreement.values():
            metric.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        release(self.model)
        found = self._agreement("val")
        if not self.trainer.sanity_checking:
            self.validation = found

    @override
    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()
        self._rows: list[dict[str, Any]] = []

    @override
    def test_step(self, batch: AnnotationBatch, batch_idx: int) -> ScoredBatch:
        scored = self._score(batch)
        for i, example in enumerate(scored.examples):
            known, score = example.annotation, float(scored.answers.scores[i])
            self._rows.append(
                {
                    "id": known.id, "dimension": known.dimension, "image": str(known.image), "group": known.group,
                    "truth": known.score, "score": None if math.isnan(score) else round(score, 6),
                    "outside_mass": round(float(scored.answers.outside_mass[i]), 6),
                    "reasoning": scored.answers.reasoning[i], "retried": bool(scored.answers.retried[i]),
                }
            )  # fmt: skip
        return scored

    @override
    def on_test_epoch_end(self) -> None:
        release(self.model)
        self._agreement("test")
        if self.trainer.log_dir is not None:
            rank = "" if self.trainer.world_size == 1 else f"-rank{self.global_rank}"
            self.write_rows(f"test_scores{rank}.jsonl", self._rows)

    def _score(self, batch: AnnotationBatch) -> ScoredBatch:
        answers = self.reader.read(self.questions(batch.examples))
        known = [e.annotation for e in batch.examples]
        for dimension in {a.dimension for a in known}:
            index = [i for i, a in enumerate(known) if a.dimension == dimension]
            self.agreement[dimension].update(
                answers.scores[index], batch.scores[index], [known[i].group for i in index]
            )
        return ScoredBatch(examples=batch.examples, answers=answers)

    def _agreement(self, prefix: str) -> dict[str, dict[str, float | None]]:
        """Compute and log every metric that is defined; None stands for one that is not."""
        found: dict[str, dict[str, float | None]] = {}
        for dimension, metric in self.agreement.items():
            values = {name: float(value) for name, value in metric.compute().items()}
            if values["count"]:
                found[dimension] = {name: None if math.isnan(v) else v for name, v in values.items()}
        logged = {f"{prefix}/{d}/{n}": v for d, values in found.items() for n, v in values.items() if v is not None}
        for name in _AVERAGED:
            values = [metrics[name] for metrics in found.values() if metrics[name] is not None]
            if values:
                logged[f"{prefix}/mean/{name}"] = sum(values) / len(values)
        self.log_dict(logged)
        return found

    # ----------------------------------------------------------------- checkpoints and export

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward"] = {"validation": self.validation}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.validation = checkpoint["reward"]["validation"]

    def export(self, path: str | Path) -> None:
        """Write a directory that plain transformers loads, adapters merged, with `reward.json` beside the weights."""
        save_plain(self.model, self.processor, path)
        if not first_rank():
            return
        RewardSpec(
            rubrics=self.rubrics,
            reading=self.reading,
            digit_token_ids=self.reader.digits,
            validation=self.validation,
            base=self.model_path,
        ).write(path)
