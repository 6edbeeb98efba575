"""A fine-tuned vision-language model as a reward.

Shapes: N samples.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from typing_extensions import override

from flow_rl.models.vision_language import check_vlm_path, load_vlm
from flow_rl.rewards.base import Reward, Samples
from flow_rl.rewards.conversation import Question
from flow_rl.rewards.fingerprints import digest, digest_directory
from flow_rl.rewards.pixels import finite_images, quantise
from flow_rl.rewards.reading import Answers, ScoreReader
from flow_rl.rewards.rubrics import Rubric
from flow_rl.rewards.spec import RewardSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

VLMDtype = Literal["auto", "float32", "bfloat16"]


def planned_dtype(dtype: VLMDtype, *, on_gpu: bool) -> torch.dtype:
    """What a reward model's weights are held in.

    Args:
        dtype: as configured. `auto` is bfloat16 on a GPU, where float32 is about ten times slower, else float32.
        on_gpu: whether the model runs on a GPU that computes in bfloat16.
    """
    return DTYPES[("bfloat16" if on_gpu else "float32") if dtype == "auto" else dtype]


def stored_dtype(path: str | Path) -> torch.dtype:
    """What the weights of a model directory are stored in, from its config alone; float32 if that does not say."""
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return DTYPES.get(config.get("dtype") or config.get("torch_dtype"), torch.float32)


@dataclass(eq=False)
class SharedVLM:
    """A model in memory, and what belongs to it. Rewards on one export share it.

    Attributes:
        model: without gradients.
        processor: of the model.
        lock: held while a reward uses the model: a reward service scores in several threads.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    lock: threading.RLock = field(default_factory=threading.RLock)


#: models that some reward holds; one that no reward holds any more leaves the memory
_SHARED: WeakValueDictionary[tuple[object, ...], SharedVLM] = WeakValueDictionary()


def shared_vlm(path: str, *, dtype: VLMDtype = "auto", device: str | None = None) -> SharedVLM:
    """The model of an export: loaded by the first reward that asks, shared by all others of the same kind.

    Args:
        path: the export. One whose files have changed since is another one.
        dtype: as configured.
        device: as configured. Rewards with different devices hold different copies.
    """
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    states = [(file, file.stat()) for file in files]
    version = tuple((str(file), state.st_size, state.st_mtime_ns) for file, state in states)
    key = (str(Path(path).resolve()), version, dtype, device)
    found = _SHARED.get(key)
    if found is None:
        model, processor = load_vlm(path, dtype=stored_dtype(path) if dtype == "auto" else DTYPES[dtype])
        found = _SHARED[key] = SharedVLM(model=model.requires_grad_(False), processor=processor)
    return found


class VLMReward(Reward):
    """Scores images with an export of `RewardFinetune`. Several of one export, dtype and device share its weights.

    In float32 a score depends on its own image, prompt and rubric alone, to 1e-4. In bfloat16, kernels that round
    differently for other batch sizes can change a greedy token: scores are reproducible for one batch composition only.

    Args:
        path: the export.
        dimension: which of its rubrics to judge by.
        rubric: name or path of the rubric that you expect; refused if the model was trained with another text. None
            takes the model's own.
        reasoning: reason before the score, or read it at once (cheap). None here and below: as the export says.
        max_new_tokens: most tokens of reasoning.
        batch_size: images scored at a time.
        max_outside: most probability outside of the digits at the score's position; with more, NaN.
        cap: apply the rubric's cap.
        dtype: of the weights. `auto` takes bfloat16 on a GPU that computes in it, else float32; the first images
            decide.
        device: where to run; None follows the images.

    Raises:
        ValueError: not an export, an unknown dimension, or a rubric whose hash differs; before any weights load.
    """

    def __init__(
        self,
        path: str,
        dimension: str,
        rubric: str | None = None,
        reasoning: bool | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        max_outside: float | None = None,
        cap: bool | None = None,
        dtype: VLMDtype = "auto",
        device: str | None = None,
    ) -> None:
        try:
            check_vlm_path(path)
        except ValueError as error:
            raise ValueError(f"{error} A VLMReward needs the export of a reward model: train one first.") from None
        spec = RewardSpec.read(path)
        expected = None if rubric is None else Rubric.load(rubric)
        self.rubric = spec.rubric(dimension, expected=expected, path=path)
        given: dict[str, Any] = {
            "reasoning": reasoning, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
            "max_outside": max_outside, "cap": cap,
        }  # fmt: skip
        self.settings = replace(spec.reading, **{name: value for name, value in given.items() if value is not None})
        self.spec, self.device = spec, device
        self.path, self.dtype = path, dtype
        self._placed = False
        self._totals = {"count": 0.0, "parsed": 0.0, "retried": 0.0, "outside": 0.0, "read": 0.0, "written": 0.0}
        self.load()

    def load(self) -> None:
        """Load the weights, or share those that another reward on the export has loaded.

        Raises:
            ValueError: a tokenizer that is not that of the export.
        """
        self._shared = shared_vlm(self.path, dtype=self.dtype, device=self.device)
        self.reader = ScoreReader(self._shared.model, self._shared.processor, self.settings)
        if self.reader.digits != self.spec.digit_token_ids:
            raise ValueError(
                f"'{self.path}': the tokenizer gives the digits the ids {self.reader.digits}, the export was made with "
                f"{self.spec.digit_token_ids}: model and tokenizer do not belong together."
            )

    @property
    @override
    def judges_edits(self) -> bool:
        return self.rubric.task == "edit"

    @override
    def score(self, samples: Samples) -> Tensor:
        """Score a batch; NaN where no score could be read, or the image is not finite."""
        return self.answers(samples).scores

    def answers(self, samples: Samples) -> Answers:
        """As `score`, with the reasonings.

        Raises:
            ValueError: a rubric for edits, and samples without source images.
        """
        if self.rubric.task == "edit" and samples.sources is None:
            raise ValueError(f"The reward '{self.rubric.name}' judges edits, but the samples have no source images.")
        images, finite = finite_images(samples.images)
        pictures = quantise(images)
        sources = None if samples.sources is None else quantise(finite_images(samples.sources)[0])
        questions = [
            Question(
                rubric=self.rubric,
                prompt=prompt,
                image=pictures[i],
                source=None if sources is None else sources[i],
            )
            for i, prompt in enumerate(samples.prompts)
        ]
        with self._shared.lock:
            self._place(torch.device(self.device) if self.device is not None else samples.images.device)
            answers = self.reader.read(questions)
        answers = replace(answers, scores=torch.where(finite, answers.scores, torch.nan))
        self._count(answers)
        return answers

    def _place(self, device: torch.device) -> None:
        """Put the model on the device that is to compute, the first time in the dtype for it."""
        if not self._placed:
            # Emulated bfloat16 is slower than float32.
            native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            cast_weights(self.reader.model, planned_dtype(self.dtype, on_gpu=native))
            self._placed = True
        self.reader.model.to(device)

    @override
    def fingerprint(self) -> str:
        """See `Reward.fingerprint`: of the export's files, as the weights in memory change dtype once they are used."""
        parts = {"files": digest_directory(self.path), "rubric": self.rubric, "dtype": self.dtype}
        return digest(parts | {"settings": self.settings})

    @override
    def statistics(self) -> dict[str, float]:
        """Since the last call: `parse_rate`, `retry_rate`, mean `outside_mass` and mean `reasoning_length`.

        The length is in characters. Empty if nothing was scored.
        """
        totals, self._totals = self._totals, dict.fromkeys(self._totals, 0.0)
        if not totals["count"]:
            return {}
        return {
            "parse_rate": totals["parsed"] / totals["count"],
            "retry_rate": totals["retried"] / totals["count"],
            "outside_mass": totals["outside"] / max(totals["read"], 1.0),
            "reasoning_length": totals["written"] / totals["count"],
        }

    def _count(self, answers: Answers) -> None:
        mass = answers.outside_mass
        found = {
            "count": len(answers.scores),
            "parsed": int(answers.parsed.sum()),
            "retried": int(answers.retried.sum()),
            "outside": float(mass.nansum()),
            "read": int((~mass.isnan()).sum()),
            "written": sum(map(len, answers.reasoning)),
        }
        for name, value in found.items():
            self._totals[name] += value


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring floating-point parameters to a dtype. Buffers, such as rotary frequencies, keep their precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
