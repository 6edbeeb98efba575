"""The demo's stages in small, built as its configs build them: shipped base, verifiers and prompts, nothing rendered.

Edits are of noise and annotations are made up: what is checked is that every stage trains on the device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule
from PIL import Image

from benchmarks.gpu.parity import BASE, SIZE
from benchmarks.gpu.policies import OBJECTIVES
from datamodules import (
    AlternatingTaskDataModule,
    AnnotationDataModule,
    CaptionedImageDataModule,
    EditPairDataModule,
    MixedTaskDataModule,
    PromptDataModule,
)
from datamodules.captioned_images import CaptionedDataset, Example
from datamodules.task_schedule import TaskRatios
from flow_rl.distillation.settings import DistillationSettings, TeacherSettings
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.windows import WindowSettings
from flow_rl.models import load_image_model
from flow_rl.models.adapters import LoraSettings
from flow_rl.rewards import Reward
from flow_rl.rewards.finetune_settings import RewardObjective
from flow_rl.rewards.reading import ReadingSettings
from flow_rl.rl.settings import RolloutSettings
from lightning_modules import DistillationStudent, FlowPretrain, GRPOPolicy, RewardFinetune

Built = tuple[LightningModule, LightningDataModule]

SPLITS = ("train", "validation", "test")
CAPTIONS = ("a person with red hair", "a potted tulip in a blue pot", "a red creature")
ADAMW = partial(torch.optim.AdamW, lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0)
PROMPTS_PER_STEP = 2
LORA = LoraSettings(rank=4, alpha=8)
#: of rollouts, and of the teachers that they train
GUIDANCE = Guidance(scale=2.5)


def noise_picture(path: Path, seed: int, size: int) -> str:
    """Write a picture of noise; returns its name."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSON Lines file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def edit_files(directory: Path, size: int, instructions: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Edit files, by the argument names of `EditPairDataModule`."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, split in enumerate(SPLITS):
        rows = []
        for i in range(8):
            key = 100_000 + 8 * number + i
            text, category = instructions[i % len(instructions)]
            source = noise_picture(directory / f"{key}.png", key, size)
            rows.append({"id": key, "instruction": text, "source": source, "category": category})
        files[f"{split}_file"] = write_lines(directory / f"{split}.jsonl", rows)
    return files


def prompts(**changes: Any) -> PromptDataModule:
    """The demo's prompts."""
    files = {f"{split}_file": f"demo/prompts/{split}.jsonl" for split in SPLITS}
    return PromptDataModule(**files, **{"prompts_per_step": PROMPTS_PER_STEP, "max_train": 64} | changes)


def edits(directory: Path) -> EditPairDataModule:
    """Edits of noise."""
    files = edit_files(directory / "edits", SIZE[0], demo_instructions())
    return EditPairDataModule(image_size=SIZE[0], prompts_per_step=PROMPTS_PER_STEP, **files)


def demo_instructions() -> tuple[tuple[str, str], ...]:
    """Instructions that the demo's rewards can read, with their categories."""
    from demo.world.edits import EDITABLE, make_edit

    pairs = [make_edit(0, i, split="train", category=category) for i, category in enumerate(EDITABLE)]
    return tuple((pair.instruction, pair.category) for pair in pairs)


class NoiseCaptions(CaptionedDataset):
    """Pictures of noise with captions; every third is an edit."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Example:
        generator = torch.Generator().manual_seed(index)
        image, source = torch.rand(2, 3, *SIZE, generator=generator)
        return image, CAPTIONS[index % len(CAPTIONS)], source if index % 3 == 0 else None


def demo_rewards(*tasks: str) -> dict[str, Reward]:
    """The demo's own rewards of these tasks."""
    from demo.scorers.edit_rewards import EditConsistencyReward, EditSuccessReward
    from demo.scorers.rewards import AttributeReward, QualityReward

    made: dict[str, Reward] = {}
    if "t2i" in tasks:
        made |= {"alignment": AttributeReward("annotator", "probability"), "quality": QualityReward("annotator")}
    if "edit" in tasks:
        success, consistency = EditSuccessReward("annotator", "probability"), EditConsistencyReward("annotator")
        made |= {"success": success, "consistency": consistency}
    return made


WEIGHTS = {"t2i": {"alignment": 0.8, "quality": 0.2}, "edit": {"success": 0.6, "consistency": 0.4}}


def policy(*tasks: str, kind: str = "nft", **changes: Any) -> GRPOPolicy:
    """A policy as in configs/demo: NFT on ODE rollouts, or the clipped objective on stochastic ones."""
    weights: Any = {task: WEIGHTS[task] for task in tasks}
    matching = {"reference_weight": 0.003, "old_decay": 0.0}
    # A policy gradient is refused with guidance on a coarse last step.
    guidance = (
        {"guidance": GUIDANCE, "cfg": "rollout_only"}
        if kind == "nft"
        else {"guidance": Guidance(scale=1.0), "cfg": "none"}
    )
    arguments = {
        "model_path": BASE,
        "image_size": SIZE[0],
        "rewards": demo_rewards(*tasks),
        "reward_weights": weights if len(tasks) > 1 else weights[tasks[0]],
        "optimizer": ADAMW,
        "rollout": RolloutSettings(
            num_steps=4, group_size=2, batch_size=96, **guidance,
            transition="ode" if kind == "nft" else "flow_sde", window=WindowSettings(count=2, fraction=0.75),
        ),
        "objective": OBJECTIVES[kind](micro_batch_size=96, **(matching if kind == "nft" else {})),
    }  # fmt: skip
    return GRPOPolicy(**arguments | changes)


def teacher(directory: Path, seed: int) -> str:
    """A teacher on disk: the base with its transformer's weights moved a little."""
    path = directory / f"teacher_{seed}"
    if not path.exists():
        model = load_image_model(BASE, image_size=SIZE)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.transformer.parameters():
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.02 * parameter.square().mean().sqrt() * step)
        model.save_pretrained(path)
    return str(path)


def t2i(directory: Path, **changes: Any) -> Built:
    """configs/demo/t2i_teacher.yaml."""
    return policy("t2i", **changes), prompts()


def clipped(directory: Path, **changes: Any) -> Built:
    """configs/demo/t2i_teacher.yaml with configs/objective/clipped.yaml and configs/adapter/lora.yaml."""
    return policy("t2i", kind="clipped", **{"lora": LORA} | changes), prompts()


def edit(directory: Path) -> Built:
    """configs/demo/edit_teacher.yaml."""
    return policy("edit"), edits(directory)


def mix_rl(directory: Path) -> Built:
    """configs/demo/mix_rl.yaml."""
    return policy("t2i", "edit"), MixedTaskDataModule(prompts(), edits(directory))


def student(directory: Path) -> Built:
    """configs/demo/student.yaml: the two tasks take turns, so that the teachers are swapped."""
    module = DistillationStudent(
        model_path=BASE,
        image_size=SIZE[0],
        teachers={
            "t2i": TeacherSettings(path=teacher(directory, 1), guidance=GUIDANCE),
            "edit": TeacherSettings(path=teacher(directory, 2), guidance=GUIDANCE),
        },
        optimizer=ADAMW,
        distillation=DistillationSettings(num_steps=4, micro_batch_size=96),
    )
    schedule = [TaskRatios(start=0, ratios={"t2i": 1, "edit": 1})]
    return module, AlternatingTaskDataModule(t2i=prompts(), edit=edits(directory), schedule=schedule)


def pretrain(directory: Path) -> Built:
    """configs/demo/pretrain.yaml, on noise."""
    module = FlowPretrain(model_path=BASE, image_size=SIZE[0], optimizer=ADAMW, train_text_encoder=True)
    return module, CaptionedImageDataModule(NoiseCaptions(), NoiseCaptions(), batch_size=6)


def reward(directory: Path) -> Built:
    """configs/demo/reward.yaml, on noise."""
    images = directory / "annotations"
    images.mkdir(exist_ok=True)
    rows = []
    for i in range(16):
        image = noise_picture(images / f"{i}.png", i, SIZE[0])
        row = {"id": i, "image": image, "prompt": CAPTIONS[i % 3], "dimension": "alignment", "score": 1 + i % 5}
        rows.append(row | {"reasoning": "the hair is red."})
    file = write_lines(images / "train.jsonl", rows)
    module = RewardFinetune(
        model_path="demo/vlm",
        optimizer=ADAMW,
        rubrics={"alignment": "demo/rubrics/alignment.yaml"},
        objective=RewardObjective(kind="pointwise", cross_entropy=1.0, regression=0.5, direct_share=0.3),
        reading=ReadingSettings(reasoning=True, batch_size=64),
    )
    return module, AnnotationDataModule([file], [file], batch_size=8)


STAGES: Mapping[str, Callable[[Path], Built]] = {
    "t2i_teacher": t2i, "t2i_teacher, clipped, LoRA": clipped, "edit_teacher": edit, "mix_rl": mix_rl,
    "student": student, "pretrain": pretrain, "reward": reward,
}  # fmt: skip
