"""The teachers of a distillation: frozen, keyed by task, with room for one on the device.

All teachers come from one base, so they share the student's text encoder, image decoder and schedule, and all their
transformers have the same layers. One transformer on the device therefore plays them all: its weights are those of the
teacher that is due (see `teacher_slot`). Adapter teachers are a switch of the adapter. Where the student is an adapter
itself, over the same frozen weights, its own transformer plays them and there is no second copy at all.

Nothing here is a submodule of the student: optimizer, checkpoints and gradient synchronisation never see a teacher.

Shapes: M states, S latent tokens, C latent channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flow_rl.distillation.settings import TeacherSettings
from flow_rl.distillation.teacher_slot import TeacherSlot, base_tensors
from flow_rl.distributed.devices import to_device
from flow_rl.distributed.loading import own_pieces, stored_tensors
from flow_rl.distributed.sharding import gathered
from flow_rl.flow.guidance import Guidance, guide
from flow_rl.models import Conditioning, ImageModel
from flow_rl.models.adapters import STUDENT_ADAPTER, load_frozen_adapter, use_adapter
from flow_rl.models.shard_units import ShardUnit
from flow_rl.models.stored import StoredComponent, empty_component, local_directory

Spread = Callable[[nn.Module, Sequence[ShardUnit]], Any]


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

    @property
    def _own(self) -> TeacherSlot:
        """The slot of teachers that the student's own transformer does not play."""
        assert self.slot is not None, "there is a slot wherever a task has a key"
        return self.slot

    def _transformer(self, task: str) -> nn.Module:
        return self._own.transformer if task in self._keys else self._student.transformer

    @contextmanager
    def gathered(self, task: str) -> Iterator[None]:
        """Many evaluations of a teacher, for which its pieces come together once. Every rank must enter.

        Only a transformer of the teachers' own is gathered: the student's is, by whoever evaluates it.
        """
        with ExitStack() as whole:
            if task in self._keys:
                self._own.place(self._student.device)
                self._own.ready(self._keys[task])
                whole.enter_context(gathered(self._own.transformer))
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
            self._own.place(self._student.device)
            self._own.prefetch(self._keys[task])

    @contextmanager
    def playing(self, task: str) -> Iterator[ImageModel]:
        """The generator with the transformer of the task's teacher, to be evaluated without gradient in the block."""
        self.guidance(task)
        adapter = _adapter_name(task) if self.teachers[task].adapter is not None else None
        transformer = self._transformer(task)
        if task in self._keys:
            self._own.place(self._student.device)
            self._own.ready(self._keys[task])
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
        *,
        levels: Sequence[float] | None = None,
    ) -> Tensor:
        """The guided velocity of a task's teacher.

        Args:
            task: whose teacher; call it inside no `playing` of its own.
            latents: states, shape (M, S, C).
            sigma: noise level of each, shape (M,).
            conditional: of the M states.
            unconditional: of the same with a blank prompt; None where the teacher has no guidance.
            levels: the noise levels as the host knows them; None reads `sigma`, for which the host waits.

        Returns:
            float32, shape (M, S, C), without gradient.
        """
        guidance = self.guidance(task)
        levels = sigma.tolist() if levels is None else levels
        active = [i for i, level in enumerate(levels) if guidance.active(level)]
        with self.playing(task) as teacher:
            velocity = teacher.velocity(latents, sigma, conditional)
            if not active:
                return velocity
            assert unconditional is not None, "a guided teacher's states come with their unconditional branch"
            if len(active) == len(levels):
                uncond = teacher.velocity(latents, sigma, unconditional)
                return guide(velocity, uncond, guidance.scale, rescale=guidance.rescale)
            rows = to_device(torch.tensor(active), latents.device)
            uncond = teacher.velocity(latents[rows], sigma[rows], unconditional.select(active))
            velocity[rows] = guide(velocity[rows], uncond, guidance.scale, rescale=guidance.rescale)
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
