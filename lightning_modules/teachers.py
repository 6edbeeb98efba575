"""The teachers of a distillation: frozen, keyed by task, with room for one on the device.

All teachers come from one base, so they share the student's text encoder, image decoder and schedule, and all their
transformers have the same layers. One transformer on the device therefore plays them all: the weights of each wait on
the CPU and are copied in when due, on a stream of their own, so that the copy hides behind the student's work. Adapter
teachers are a switch of the adapter. Where the student is an adapter itself, over the same frozen weights, its own
transformer plays them and there is no second copy at all.

Nothing here is a submodule of the student: optimizer, checkpoints and gradient synchronisation never see a teacher.

Shapes: M states, S latent tokens, C latent channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from flow.guidance import Guidance, guide
from lightning_modules.distillation_settings import TeacherSettings
from models import Conditioning, ImageModel
from models.adapters import STUDENT_ADAPTER, load_frozen_adapter, use_adapter

Weights = Mapping[str, Tensor]


class TeacherSlot:
    """One frozen transformer that takes on the weights of several.

    Args:
        transformer: any of them, on the CPU.
        weights: the tensors of each on the CPU, by key; all with the transformer's names and shapes.
        offload: copy into tensors that stay on the device; False points at the CPU tensors, which moves nothing; None
            decides by the device.
    """

    def __init__(self, transformer: nn.Module, weights: Mapping[str, Weights], *, offload: bool | None = None) -> None:
        self.transformer = transformer.requires_grad_(False).eval()
        self.loaded: str | None = None
        #: how often another teacher's weights came in
        self.moves = 0
        self._weights = {key: dict(tensors) for key, tensors in weights.items()}
        self._offload = offload
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        self._own_storage = False

    @property
    def bytes_on_device(self) -> int:
        """Memory that teachers hold on the device, however many there are."""
        return sum(p.numel() * p.element_size() for p in self.transformer.parameters())

    def place(self, device: torch.device) -> None:
        """Make room on the device, once."""
        device = torch.device(device)
        offload = device.type != "cpu" if self._offload is None else self._offload
        if device == self._device and offload == self._own_storage:
            return
        with torch.inference_mode(False), torch.no_grad():
            if offload:  # tensors of its own, to be overwritten: the ones on the CPU must stay as they are
                for tensor in self._tensors().values():
                    tensor.data = torch.empty_like(tensor, device=device)
            self.transformer.to(device)
            if device.type == "cuda":
                self._stream = torch.cuda.Stream(device)
                pinned = {key: {n: t.pin_memory() for n, t in w.items()} for key, w in self._weights.items()}
                self._weights = pinned
        self._device, self._own_storage, self.loaded = device, offload, None

    def prefetch(self, key: str) -> None:
        """Start bringing in the weights of `key`; returns at once. The present ones must not be needed any more."""
        if key == self.loaded:
            return
        self.loaded, self.moves = key, self.moves + 1
        if self._stream is not None:  # what still reads the old weights comes first
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            for name, tensor in self._tensors().items():
                if self._own_storage:
                    tensor.copy_(self._weights[key][name], non_blocking=True)
                else:
                    tensor.data = self._weights[key][name]

    def ready(self, key: str) -> None:
        """Bring in the weights of `key` unless they are there, and wait for them."""
        self.prefetch(key)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _tensors(self) -> dict[str, Tensor]:
        """What differs between teachers, under its name without adapters."""
        return base_tensors(self.transformer)


def base_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a transformer without its adapters, by the names they had before any."""
    named = chain(transformer.named_parameters(), transformer.named_buffers())
    return {name.replace(".base_layer", ""): tensor for name, tensor in named if ".lora_" not in name}


class TeacherBank:
    """Gives the guided velocity of the teacher of a task.

    Args:
        student: shares everything but its transformer with the teachers.
        teachers: by task; see `distillation_settings.check_teachers`, which must have passed.
        model_path: the base, for teachers that name no path.
        shared_path: where the student's frozen weights come from if it is an adapter; None if all its weights train.
        offload: see `TeacherSlot`.
    """

    def __init__(
        self,
        student: ImageModel,
        teachers: Mapping[str, TeacherSettings],
        *,
        model_path: str,
        shared_path: str | None = None,
        offload: bool | None = None,
    ) -> None:
        self.teachers = dict(teachers)
        #: evaluations of each teacher, conditional and unconditional ones
        self.calls: Counter[str] = Counter()
        self._student = student
        shared = None if shared_path is None else str(Path(shared_path).resolve())
        paths = {task: str(Path(t.path or model_path).resolve()) for task, t in self.teachers.items()}
        #: key of the weights in the slot, by task; tasks that the student's own transformer plays are not in it
        self._keys = {task: path for task, path in paths.items() if path != shared}
        self.slot = self._make_slot(offload) if self._keys else None
        for task, teacher in self.teachers.items():
            if teacher.adapter is not None:
                load_frozen_adapter(self._transformer(task), teacher.adapter, _adapter_name(task))

    def _make_slot(self, offload: bool | None) -> TeacherSlot:
        family = type(self._student.transformer)
        dtype = next(self._student.transformer.parameters()).dtype
        loaded = {
            path: family.from_pretrained(path, subfolder="transformer", torch_dtype=dtype)
            for path in dict.fromkeys(self._keys.values())
        }
        weights = {path: {n: t.detach() for n, t in base_tensors(m).items()} for path, m in loaded.items()}
        return TeacherSlot(next(iter(loaded.values())), weights, offload=offload)

    def _transformer(self, task: str) -> nn.Module:
        return self.slot.transformer if task in self._keys else self._student.transformer

    def guidance(self, task: str) -> Guidance:
        """How the task's teacher is guided.

        Raises:
            ValueError: a task without a teacher.
        """
        if task not in self.teachers:
            raise ValueError(
                f"A batch is of the task '{task}', but model.teachers has {', '.join(self.teachers)} only. "
                "Add a teacher."
            )
        return self.teachers[task].guidance

    def prefetch(self, task: str | None) -> None:
        """Start bringing the teacher of a task in, ahead of need. Only a hint: None and unknown tasks are fine."""
        if task in self._keys:
            self.slot.place(self._device())
            self.slot.prefetch(self._keys[task])

    def _device(self) -> torch.device:
        return next(self._student.transformer.parameters()).device

    @contextmanager
    def playing(self, task: str) -> Iterator[ImageModel]:
        """The generator with the transformer of the task's teacher, to be evaluated without gradient in the block."""
        self.guidance(task)
        adapter = _adapter_name(task) if self.teachers[task].adapter is not None else None
        transformer = self._transformer(task)
        if task in self._keys:
            self.slot.place(self._device())
            self.slot.ready(self._keys[task])
            use_adapter(transformer, adapter)
            yield self._counted(task, _with_transformer(self._student, transformer))
            return
        training = transformer.training
        use_adapter(transformer.eval(), adapter)
        try:
            yield self._counted(task, copy(self._student))
        finally:
            use_adapter(transformer, STUDENT_ADAPTER)
            transformer.train(training)

    def _counted(self, task: str, model: ImageModel) -> ImageModel:
        evaluate = model.velocity

        def velocity(latents: Tensor, sigma: float | Tensor, conditioning: Conditioning) -> Tensor:
            self.calls[task] += 1
            return evaluate(latents, sigma, conditioning)

        object.__setattr__(model, "velocity", velocity)
        return model

    @torch.no_grad()
    def velocity(
        self,
        task: str,
        latents: Tensor,
        sigma: Tensor,
        conditional: Conditioning,
        unconditional: Conditioning | None,
    ) -> Tensor:
        """The guided velocity of a task's teacher.

        Args:
            task: whose teacher; call it inside no `playing` of its own.
            latents: states, shape (M, S, C).
            sigma: noise level of each, shape (M,).
            conditional: of the M states.
            unconditional: of the same with a blank prompt; None where the teacher has no guidance.

        Returns:
            float32, shape (M, S, C), without gradient.
        """
        guidance = self.guidance(task)
        active = [i for i, level in enumerate(sigma.tolist()) if guidance.active(level)]
        with self.playing(task) as teacher:
            velocity = teacher.velocity(latents, sigma, conditional)
            if active:
                uncond = teacher.velocity(latents[active], sigma[active], unconditional.select(active))
                velocity[active] = guide(velocity[active], uncond, guidance.scale, rescale=guidance.rescale)
        return velocity


def _with_transformer(model: ImageModel, transformer: nn.Module) -> ImageModel:
    """The same generator around another transformer; everything else is shared, not copied."""
    other = copy(model)
    other.__dict__["_modules"] = {**model._modules, "transformer": transformer}
    return other


def _adapter_name(task: str) -> str:
    """What a teacher's adapter is called; peft takes no dots in it."""
    return "teacher_" + task.replace(".", "_")
