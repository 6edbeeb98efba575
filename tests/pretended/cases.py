"""Every stage and its variants, small enough to take two steps in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import AutoTokenizer

from callbacks import HackingMonitor, ImageWriter, PhaseTimer, SampleGrids, UpdateProbe, WeightEMA
from cli.curate import curate
from datamodules import AlternatingTaskDataModule, CaptionedImageDataModule, MixedTaskDataModule, PreferenceDataModule
from datamodules.captioned_images import CaptionedDataset, Example
from flow_rl.curation.settings import CurationSettings
from flow_rl.distillation.settings import DistillationSettings, TeacherSettings
from flow_rl.flow.guidance import Guidance
from flow_rl.models import load_image_model
from flow_rl.models.adapters import LoraSettings, add_lora, save_adapter
from flow_rl.models.tiny.qwen_image import build_pipeline_v1
from flow_rl.rewards import Reward, Samples
from flow_rl.rewards.finetune_settings import RewardObjective
from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rewards.readout import digit_token_ids
from flow_rl.rewards.spec import RewardSpec
from flow_rl.rewards.vlm import VLMReward
from lightning_modules import DistillationStudent, FlowPretrain, GRPOPolicy
from tests.planted import Brightness
from tests.toy_vlm import BRIGHTNESS_RUBRIC, rubric, toy_data, toy_files, toy_module

#: what the tiny model's tokenizer is trained on
TEXTS = ("a portrait of a person with red hair", "a tulip in a blue pot, yellow background", "make the pot red")
LORA = LoraSettings(rank=4, alpha=8)
#: a frozen bf16 base under an fp32 adapter, blocks recomputed
LIGHT = {"lora": LORA, "frozen_dtype": "bfloat16", "gradient_checkpointing": True}
VALIDATED = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}


class Darkness(Reward):
    """5 for black, 1 for white."""

    def score(self, samples: Samples) -> Tensor:
        return 6 - Brightness().score(samples)


class Noise(CaptionedDataset):
    """Pictures of noise; every other one has a source."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Example:
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return image, "a red pot" + " of tea" * (index % 3), image if index % 2 else None


def callbacks() -> list[Callback]:
    """All that look at the model while it trains."""
    monitor = HackingMonitor(every=1, prompts=2, members=2, rollouts=True)
    return [WeightEMA(decay=0.9), UpdateProbe(every=1, prompts=2), PhaseTimer(), SampleGrids(), monitor]


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The cases by name, as methods; see `names`.

    Attributes:
        policy: makes a GRPO policy (fixture).
        data: makes prompts (fixture).
        edits: makes edits (fixture).
        base: directory of the tiny model.
        directory: for what a case writes.
    """

    policy: Callable[..., GRPOPolicy]
    data: Callable[..., LightningDataModule]
    edits: Callable[..., LightningDataModule]
    base: str
    directory: Path

    def trainer(self, **changes: object) -> Trainer:
        """Two steps on the pretended GPU."""
        arguments = {
            "accelerator": "gpu", "devices": 1, "max_steps": 2, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "limit_val_batches": 1, "log_every_n_steps": 1, "default_root_dir": str(self.directory),
        }  # fmt: skip
        return Trainer(**(arguments | changes))

    def fit(self, module: LightningModule, data: LightningDataModule, **changes: object) -> LightningModule:
        self.trainer(**changes).fit(module, data)
        return module

    # ----------------------------------------------------------------- GRPO

    def clipped_with_callbacks_and_validation(self, start: Callable) -> None:
        module = start(self._policy("clipped", monitors={"darkness": Darkness()}))
        logger = TensorBoardLogger(self.directory, name="", version="", default_hp_metric=False)
        self.fit(module, self.data(), callbacks=callbacks(), logger=logger, **VALIDATED)

    def guarded_with_two_updates(self, start: Callable) -> None:
        self.fit(start(self._policy("guarded", objective={"updates": 2})), self.data())

    def guidance_in_both(self, start: Callable) -> None:
        self.fit(start(self._policy("clipped", rollout={"cfg": "both"})), self.data())

    def pieces(self, start: Callable) -> None:
        self.fit(start(self._policy("clipped", rollout={"batch_size": 2})), self.data())

    def nft(self, start: Callable) -> None:
        self.fit(start(self._policy("nft")), self.data())

    def nft_with_old_policy_and_reference(self, start: Callable) -> None:
        objective = {"old_decay": 0.5, "reference_weight": 0.01}
        self.fit(start(self._policy("nft", objective=objective)), self.data(), callbacks=callbacks()[:2])

    def kl_and_shared_noise(self, start: Callable) -> None:
        module = self._policy("clipped", objective={"kl_weight": 0.04}, rollout={"shared_noise": True})
        self.fit(start(module), self.data())

    def edits_with_callbacks(self, start: Callable) -> None:
        module = start(self._policy("clipped", monitors={"darkness": Darkness()}))
        self.fit(module, self.edits(), callbacks=callbacks())

    def mixed_tasks(self, start: Callable) -> None:
        module = start(self._policy("clipped", monitors={"darkness": Darkness()}))
        mixed = MixedTaskDataModule(self.data(), self.edits(prompts_per_step=1, seed=5))
        self.fit(module, mixed, callbacks=[HackingMonitor(every=1, prompts=4)])

    def lora_bf16_checkpointing(self, start: Callable) -> None:
        module = start(self._policy("clipped", objective={"kl_weight": 0.04}, **LIGHT))
        self.fit(module, self.data(), callbacks=callbacks()[:2])

    def lora_bf16_checkpointing_edits(self, start: Callable) -> None:
        self.fit(start(self._policy("clipped", **LIGHT)), self.edits())

    def bf16_mixed_precision(self, start: Callable) -> None:
        self.fit(start(self._policy("clipped")), self.data(), precision="bf16-mixed")

    def qwen_image_v1(self, start: Callable) -> None:
        path = self.directory / "v1"
        build_pipeline_v1(TEXTS).save_pretrained(path)
        self.fit(start(self._policy("clipped", model_path=str(path))), self.data())

    def testing_and_prediction(self, start: Callable) -> None:
        module = start(self._policy("clipped", judges={"darkness": Darkness()}, test_members=2))
        writer = ImageWriter(str(self.directory / "images"))
        self.trainer(callbacks=[writer], limit_test_batches=1).test(module, self.data(), verbose=False)
        self.trainer(callbacks=[writer], limit_predict_batches=1).predict(module, self.data(), return_predictions=False)

    def curation(self, start: Callable) -> None:
        settings = CurationSettings(scores=str(self.directory / "scores.safetensors"), threshold=0.0, batch_size=6)
        curate(self.trainer(), start(self._policy("clipped")), self.data(), settings)

    def curation_of_edits(self, start: Callable) -> None:
        settings = CurationSettings(scores=str(self.directory / "edits.safetensors"), threshold=0.0, batch_size=6)
        curate(self.trainer(), start(self._policy("nft")), self.edits(), settings)

    def vlm_reward(self, start: Callable) -> None:
        path = self.directory / "vlm"
        shutil.copytree(toy_files()["model"], path)
        reading = ReadingSettings(reasoning=False, batch_size=4)  # an untrained model's reasoning has no end
        spec = RewardSpec(
            rubrics={"brightness": rubric(**BRIGHTNESS_RUBRIC)}, reading=reading, validation={}, base="toy",
            digit_token_ids=digit_token_ids(AutoTokenizer.from_pretrained(str(path))),
        )  # fmt: skip
        spec.write(path)
        reward = VLMReward(str(path), "brightness", max_outside=1.0)
        self.fit(start(self._policy("clipped", rewards={"vlm": reward})), self.data())

    # ----------------------------------------------------------------- the other stages

    def distillation(self, start: Callable) -> None:
        self.fit(start(self._student()), self._tasks(), callbacks=[WeightEMA(decay=0.9)], **VALIDATED)

    def distillation_of_adapters(self, start: Callable) -> None:
        teachers = {
            task: TeacherSettings(path=None, adapter=self._adapter(task), guidance=Guidance(scale=2.0))
            for task in ("t2i", "edit")
        }
        self.fit(start(self._student(teachers=teachers, **LIGHT)), self._tasks())

    def distillation_bf16(self, start: Callable) -> None:
        self.fit(start(self._student(frozen_dtype="bfloat16", gradient_checkpointing=True)), self._tasks())

    def flow_pretraining(self, start: Callable) -> None:
        module = FlowPretrain(self.base, image_size=32, optimizer=partial(torch.optim.AdamW, lr=1e-3))
        self.fit(start(module), CaptionedImageDataModule(Noise(), Noise(), batch_size=4), **VALIDATED)

    def reward_fine_tuning(self, start: Callable) -> None:
        module = toy_module(lora=LORA, reading=ReadingSettings(max_new_tokens=2))
        self.fit(start(module), toy_data(batch_size=4, max_validation=4), **VALIDATED | {"num_sanity_val_steps": 0})

    def reward_fine_tuning_pairwise(self, start: Callable) -> None:
        objective, reading = RewardObjective(kind="pairwise", direct_share=1.0), ReadingSettings(reasoning=False)
        module = toy_module(objective=objective, reading=reading)
        files = [toy_files()["train"]], [toy_files()["validation"]]
        self.fit(start(module), PreferenceDataModule(*files, batch_size=4))

    def _policy(self, kind: str, rollout: dict | None = None, **changes: object) -> GRPOPolicy:
        settings = {"num_steps": 3, "group_size": 2} | (rollout or {})
        return self.policy(kind, rollout=settings, **({"model_path": self.base} | changes))

    def _student(self, **changes: object) -> DistillationStudent:
        arguments = {
            "model_path": self.base,
            "image_size": 32,
            "teachers": {
                "t2i": TeacherSettings(path=self.base, guidance=Guidance(scale=2.5, low=0.6)),
                "edit": TeacherSettings(path=self._second_teacher(), guidance=Guidance(scale=1.5)),
            },
            "optimizer": partial(torch.optim.AdamW, lr=1e-3),
            "distillation": DistillationSettings(num_steps=3, micro_batch_size=4),
        } | changes
        return DistillationStudent(**arguments)

    def _second_teacher(self) -> str:
        path = self.directory / "teacher"
        if not path.exists():
            shutil.copytree(self.base, path)
        return str(path)

    def _adapter(self, name: str) -> str:
        path = self.directory / f"adapter_{name}"
        model = load_image_model(self.base, image_size=(32, 32))
        add_lora(model.transformer, rank=4, alpha=8, dropout=0.0, targets=model.lora_targets)
        save_adapter(model.transformer, path)
        return str(path)

    def _tasks(self) -> AlternatingTaskDataModule:
        return AlternatingTaskDataModule(t2i=self.data(), edit=self.edits(prompts_per_step=1))


def names() -> list[str]:
    """Of the cases."""
    return [name for name in vars(Cases) if not name.startswith("_") and name not in ("trainer", "fit")]
