"""The teachers of a distillation: frozen, keyed by task, with room for one on the device.

All teachers come from one base, so they share the student's text encoder, image decoder and schedule, and all their
transformers have the same layers. One transformer on the device therefore plays them all: the weights of each wait on
the CPU and are copied in when due, on a stream of their own, so that the copy hides behind the student's work. Where
the student is spread over the ranks, so is that transformer, and a rank has its piece of each teacher alone. Adapter
teachers are a switch of the adapter. Where the student is an adapter itself, over the same frozen weights, its own
transformer plays them and there is no second copy at all.

Nothing here is a submodule of the student: optimizer, checkpoints and gradient synchronisation never see a teacher.

Shapes: M states, S latent tokens, C latent channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flow.guidance import Guidance, guide
from lightning_modules.distillation_settings import TeacherSettings
from models import Conditioning, ImageModel
from models.adapters import STUDENT_ADAPTER, load_frozen_adapter, use_adapter
from models.sharding import ShardUnit
from models.stored import StoredComponent, empty_component, local_directory
from strategies.loading import own_pieces, stored_tensors
from strategies.sharding import gathered, release

Weights = Mapping[str, Tensor]
Spread = Callable[[nn.Module, Sequence[ShardUnit]], Any]


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
        #: of a transformer that is spread over the ranks, what this one holds; the weights are such pieces, too
        self._shards = {n: t.to_local() for n, t in base_tensors(transformer).items() if isinstance(t, DTensor)}
        self.loaded: str | None = None
        #: how often another teacher's weights came in
        self.moves = 0
        self._weights = {key: dict(tensors) for key, tensors in weights.items()}
        self._offload = True if self._shards else offload
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None
        self._own_storage = False

    @property
    def bytes_on_device(self) -> int:
        """Memory that teachers hold on this rank's device, however many there are."""
        held = (p.to_local() if isinstance(p, DTensor) else p for p in self.transformer.parameters())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def bytes_waiting(self) -> int:
        """Memory that the weights of all teachers take on this rank's host."""
        return sum(t.numel() * t.element_size() for weights in self._weights.values() for t in weights.values())

    def place(self, device: torch.device) -> None:
        """Make room on the device, once."""
        device = torch.device(device)
        offload = device.type != "cpu" if self._offload is None else self._offload
        if device == self._device and offload == self._own_storage:
            return
        with torch.inference_mode(False), torch.no_grad():
            if not self._shards:  # those are where they belong
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
            release(self.transformer)  # whole weights that a forward left are those of another teacher
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
        return self._shards or base_tensors(self.transformer)


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
        dtype: of the teachers' weights; None takes the student's.
        spread: shards a model's units over the ranks, as it does the student's (see `strategies.distribute`). No rank
            then holds more than its piece of a teacher, on the device or waiting. None keeps them whole.
        offload: see `TeacherSlot`.
    """

    def __init__(
        self,
        student: ImageModel,
        teachers: Mapping[str, TeacherSettings],
        *,
        model_path: str,
        shared_path: str | None = None,
        dtype: torch.dtype | None = None,
        spread: Spread | None = None,
        offload: bool | None = None,
    ) -> None:
        self.teachers = dict(teachers)
        #: evaluations of each teacher, conditional and unconditional ones
        self.calls: Counter[str] = Counter()
        self._student = student
        shared = None if shared_path is None else _key(shared_path)
        paths = {task: _key(t.path or model_path) for task, t in self.teachers.items()}
        #: key of the weights in the slot, by task; tasks that the student's own transformer plays are not in it
        self._keys = {task: path for task, path in paths.items() if path != shared}
        self.slot: TeacherSlot | None = None
        self._load_adapters(student.transformer, self.teachers.keys() - self._keys.keys())
        if self._keys:
            dtype = dtype or next(student.transformer.parameters()).dtype
            make = self._make_slot if spread is None else partial(self._make_spread_slot, spread=spread)
            self.slot = make(dtype=dtype, offload=offload)

    def _load_adapters(self, transformer: nn.Module, tasks: Collection[str]) -> None:
        for task, teacher in self.teachers.items():
            if task in tasks and teacher.adapter is not None:
                load_frozen_adapter(transformer, teacher.adapter, _adapter_name(task))

    def _make_slot(self, *, dtype: torch.dtype, offload: bool | None) -> TeacherSlot:
        family = type(self._student.transformer)
        loaded = {
            path: family.from_pretrained(path, subfolder="transformer", torch_dtype=dtype)
            for path in dict.fromkeys(self._keys.values())
        }
        weights = {path: {n: t.detach() for n, t in base_tensors(m).items()} for path, m in loaded.items()}
        transformer = next(iter(loaded.values()))
        self._load_adapters(transformer, self._keys.keys())
        return TeacherSlot(transformer, weights, offload=offload)

    def _make_spread_slot(self, *, dtype: torch.dtype, offload: bool | None, spread: Spread) -> TeacherSlot:
        """As `_make_slot`, but no rank ever has more of a teacher than its piece."""
        places = {path: local_directory(path) for path in dict.fromkeys(self._keys.values())}
        transformer = empty_component(next(iter(places.values())), "transformer", dtype).requires_grad_(False)
        self._load_adapters(transformer, self._keys.keys())
        spread(transformer, (_with_transformer(self._student, transformer).shard_units()[0],))
        targets = {n.replace(".base_layer", ""): t for n, t in stored_tensors(transformer).items()}
        weights = {}
        for path, place in places.items():
            weights[path] = own_pieces(targets, StoredComponent(place / "transformer", type(transformer)))
        return TeacherSlot(transformer, weights, offload=offload)

    def has_own_transformer(self, task: str) -> bool:
        """Whether another transformer than the student's plays the task's teacher."""
        return task in self._keys

    def _transformer(self, task: str) -> nn.Module:
        return self.slot.transformer if task in self._keys else self._student.transformer

    @contextmanager
    def gathered(self, task: str) -> Iterator[None]:
        """Many evaluations of a teacher, for which its pieces come together once. Every rank must enter.

        Only a transformer of the teachers' own is gathered: the student's is, by whoever evaluates it.
        """
        with ExitStack() as whole:
            if task in self._keys:
                self.slot.place(self._device())
                self.slot.ready(self._keys[task])
                whole.enter_context(gathered(self.slot.transformer))
            yield

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


def _key(path: str | Path) -> str:
    """One name for a model however its directory is written; a hub id is its own."""
    return str(Path(path).resolve()) if Path(path).is_dir() else str(path)


def _with_transformer(model: ImageModel, transformer: nn.Module) -> ImageModel:
    """The same generator around another transformer; everything else is shared, not copied."""
    other = copy(model)
    other.__dict__["_modules"] = {**model._modules, "transformer": transformer}
    return other


def _adapter_name(task: str) -> str:
    """What a teacher's adapter is called; peft takes no dots in it."""
    return "teacher_" + task.replace(".", "_")
