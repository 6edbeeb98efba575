"""The phases of a training step at a real model's dimensions, without its values: bytes before, at the peak, after.

Weights and activations are hollow: tensors on the meta device that claim to be on cuda:0. The project's own code runs
on them, so a change in what it keeps shows here. Only live tensors count, each storage once. The allocator's rounding,
cuDNN's workspaces and the CUDA context take 2 to 4 GB more.

The transformer's blocks are alike, so bytes are an affine function of their number. Two short transformers tell it, and
the real one's bytes follow in a tenth of the time (`test_real_memory.py` compares with the real number of blocks).

Shapes: P prompts, G images a prompt, N = P G samples, S latent tokens, C latent channels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from flow_rl.batches import Prompts
from flow_rl.flow.guidance import Guidance
from flow_rl.flow.windows import WindowSettings
from flow_rl.models.adapters import LoraSettings
from flow_rl.models.image_model import Conditioning
from flow_rl.models.loading import FAMILIES, check_model_path, config_directory, read_config
from flow_rl.models.pipeline_model import PipelineModel
from flow_rl.planning.weights import build
from flow_rl.rl.objectives import Clipped, Rollout, micro_batches
from flow_rl.rl.sampling import Branches, Sampler, group_rollout
from flow_rl.rl.settings import RolloutSettings
from tests.pretended.device import pretended_cuda
from tests.pretended.memory import LiveBytes
from tests.pretended.tensor import PretendedTensor

Kind = Literal["lora", "full32", "fsdp"]
Task = Literal["t2i", "edit"]
BLANK_TOKENS = 7
TEXT_CHANNELS = 4096
#: blocks of the two short transformers. With one block alone the fullest moment of a backward can be another one than
#: with many: gradients that wait for their second use, in the prefix, add up block by block
FEW, MORE = 2, 3


@dataclass(frozen=True, kw_only=True)
class PhaseBytes:
    """Bytes that live tensors on the device hold.

    Attributes:
        before: when the phase begins.
        peak: at its fullest moment.
        after: when it ends.
    """

    before: int
    peak: int
    after: int

    def plus(self, constant: int) -> PhaseBytes:
        """With so many bytes more throughout."""
        return PhaseBytes(**{f.name: getattr(self, f.name) + constant for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What is run.

    Attributes:
        model_path: a directory or hub id whose configs are known; nothing is downloaded.
        size: height and width in pixels.
        task: text-to-image, or edits of a source image of the same size.
        kind: `lora` trains an fp32 adapter over bf16 weights; `full32` trains all weights in fp32; `fsdp` is one rank
            of `ranks` that share fp32 masters and compute in bf16.
        ranks: of `fsdp`.
        prompts: P, rolled out together.
        group: G.
        micro_batch: pairs of one backward.
        steps: T of the rollout; bytes do not depend on it from 2 on.
        text_tokens: of a prompt.
        gradient_checkpointing: recompute activations in the backward.
        state_bytes: an optimizer's bytes for each trained value; 8 for AdamW's two moments, 0 to leave them out.
        blocks: of the transformer; None for all of the model's.
    """

    model_path: str = "Qwen/Qwen-Image-2.1"
    size: int = 512
    task: Task = "t2i"
    kind: Kind = "lora"
    ranks: int = 8
    prompts: int = 1
    group: int = 16
    micro_batch: int = 2
    steps: int = 2
    text_tokens: int = 128
    gradient_checkpointing: bool = True
    state_bytes: int = 8
    blocks: int | None = None


def phases(dimensions: Dimensions) -> dict[str, PhaseBytes]:
    """Bytes of each phase with the model's own number of blocks, from two runs with few.

    Returns:
        by phase, in order: `prefix`, `rollout`, `decode`, `encode` (edits), `update forward`, `update backward`.
    """
    total = dimensions.blocks or read_config(dimensions.model_path, "transformer")["num_layers"]
    few, more = run_phases(dimensions, FEW), run_phases(dimensions, MORE)

    def extended(phase: str, name: str) -> int:
        low, high = getattr(few[phase], name), getattr(more[phase], name)
        return low + (high - low) * (total - FEW) // (MORE - FEW)

    return {phase: PhaseBytes(**{f.name: extended(phase, f.name) for f in fields(PhaseBytes)}) for phase in few}


def run_phases(dimensions: Dimensions, blocks: int | None = None) -> dict[str, PhaseBytes]:
    """Bytes of each phase, with so many blocks of the transformer (None for all of them). See `phases`."""
    with pretended_cuda(hollow=True) as state:
        made = _Phases(dimensions, state.memory, blocks)
        with made.resident():
            found = made.run()
    return found


def hollow(*shape: int, dtype: torch.dtype = torch.float32) -> PretendedTensor:
    """A tensor on the pretended device that has no values."""
    return PretendedTensor(torch.empty(shape, dtype=dtype, device="meta"))


def make_hollow(
    module: nn.Module, dtype_of: Callable[[Tensor], torch.dtype] = lambda tensor: tensor.dtype
) -> nn.Module:
    """Put a module's parameters and buffers on the pretended device, without values; tied ones stay tied.

    Args:
        module: changed in place.
        dtype_of: the dtype of each floating-point tensor.
    """
    seen: dict[int, PretendedTensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in seen:
                    dtype = dtype_of(tensor) if tensor.is_floating_point() else tensor.dtype
                    made = PretendedTensor(torch.empty(tensor.shape, dtype=dtype, device="meta"), tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter):
                        made._is_param = True
                    seen[id(tensor)] = made
                table[name] = seen[id(tensor)]
        for name, value in vars(part).items():  # rotary tables are plain attributes
            if isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
                setattr(part, name, [hollow(*v.shape, dtype=v.dtype) for v in value])
    return module


def _bytes(module: nn.Module) -> int:
    return sum({p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in module.parameters()}.values())


class _Phases:
    """The model on the device, and one pass through the phases of a step."""

    def __init__(self, dimensions: Dimensions, memory: LiveBytes, blocks: int | None) -> None:
        self.dimensions, self.memory = dimensions, memory
        self.model = self._model(blocks)
        self.grid = self.model.grid()
        self.noise_shape = self.model.latent_shape(dimensions.size, dimensions.size)

    def _model(self, blocks: int | None) -> PipelineModel:
        given, half = self.dimensions, torch.bfloat16
        parts = build(given.model_path, LoraSettings(rank=32, alpha=64) if given.kind == "lora" else None)
        if blocks is not None:
            parts.transformer.transformer_blocks = parts.transformer.transformer_blocks[:blocks]
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            str(config_directory(given.model_path)), subfolder="scheduler"
        )
        pipeline = SimpleNamespace(**vars(parts), scheduler=scheduler, config={})
        family = FAMILIES[check_model_path(given.model_path)]
        model = family(pipeline, image_size=(given.size, given.size))
        kept = {
            "lora": lambda p: torch.float32 if p.requires_grad else half,
            "full32": lambda p: torch.float32,
            "fsdp": lambda p: half,
        }
        make_hollow(model.transformer, kept[given.kind])
        make_hollow(model.text_encoder, lambda p: half)
        make_hollow(model)  # the VAE, and the latents' statistics; what is hollow already is made anew, alike
        if given.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        return model

    # ----------------------------------------------------------------- what stays on the device

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Hold the optimizer's state; of a rank of FSDP, what it has of the masters, too."""
        given = self.dimensions
        trained = sum(p.numel() for p in self.model.transformer.parameters() if p.requires_grad)
        size = trained * given.state_bytes
        if given.kind == "fsdp":
            size = self._shards(trained)
            for parameter in self.model.transformer.parameters():  # whole gradients are reduced at once
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        held = hollow(size, dtype=torch.uint8)
        yield
        del held

    def _shards(self, trained: int) -> int:
        """Bytes of one rank's pieces: fp32 masters, gradients and optimizer states, and the frozen text encoder."""
        given = self.dimensions
        return (trained * (8 + given.state_bytes) + _bytes(self.model.text_encoder)) // given.ranks

    def _not_whole(self, phase: str) -> int:
        """Bytes that the run holds and a rank of FSDP does not, in a phase.

        Rollouts and updates gather the transformer alone. Decoding and encoding find it released.
        """
        if self.dimensions.kind != "fsdp":
            return 0
        size = _bytes(self.model.text_encoder)
        return size + _bytes(self.model.transformer) * (phase in ("decode", "encode"))

    # ----------------------------------------------------------------- phases

    def run(self) -> dict[str, PhaseBytes]:
        """See `run_phases`."""
        given, found = self.dimensions, {}

        def phase(name: str, function: Callable[[], Any]) -> Any:
            gc.collect()
            before = self.memory.live
            self.memory.reset_peak()
            result = function()
            seen = PhaseBytes(before=before, peak=self.memory.peak, after=self.memory.live)
            found[name] = seen.plus(-self._not_whole(name))
            return result

        branches = self._branches()
        with torch.no_grad():
            phase("prefix", lambda: branches.cached(self.model) and None)
            trajectory = phase("rollout", lambda: self._rollout(branches))
            phase("decode", lambda: self.model.decode(trajectory.latents))
            if given.task == "edit":
                phase("encode", lambda: self.model.encode_images(hollow(1, 3, given.size, given.size)))
        self.model.transformer.train()
        rolled = self._rolled(trajectory, branches)
        loss = phase("update forward", lambda: self._loss(rolled))
        phase("update backward", loss.backward)
        return found

    def _branches(self) -> Branches:
        given = self.dimensions
        texts = self._conditioning((given.text_tokens,) * given.prompts)
        if given.task == "edit":
            return Branches(conditional=texts, unconditional=self._conditioning((BLANK_TOKENS,) * given.prompts))
        blank = self._conditioning((BLANK_TOKENS,)).select([0] * given.prompts)
        return Branches(conditional=texts, unconditional=blank)

    def _conditioning(self, lengths: tuple[int, ...]) -> Conditioning:
        edit = self.dimensions.task == "edit"
        slots = self.grid[0] * self.grid[1] // 4 if edit else 0
        masks = []
        for length in lengths:
            mask = torch.zeros(length + slots, dtype=torch.bool)
            mask[5 : 5 + slots] = True
            masks.append(mask.cuda())
        return Conditioning(
            embeds=tuple(hollow(len(mask), TEXT_CHANNELS, dtype=torch.bfloat16) for mask in masks),
            image_slots=tuple(masks),
            target_grid=self.grid,
            source_grid=self.grid if edit else None,
            source_latents=hollow(len(lengths), *self.noise_shape) if edit else None,
            rows=torch.arange(len(lengths)),
        )

    @property
    def _settings(self) -> RolloutSettings:
        given = self.dimensions
        return RolloutSettings(
            num_steps=given.steps,
            group_size=given.group,
            guidance=Guidance(scale=4.0),
            transition="flow_sde",
            window=WindowSettings(count=1, fraction=0.9),
            batch_size=given.group * given.prompts,
        )

    @property
    def _prompts(self) -> Prompts:
        count = self.dimensions.prompts
        return Prompts(ids=tuple(range(count)), texts=("x",) * count, categories=("c",) * count, sources=None)

    def _rollout(self, branches: Branches) -> Any:
        given, settings = self.dimensions, self._settings
        size = (given.size, given.size)
        sampler = Sampler(sigmas=self.model.sigmas(given.steps), guidance=settings.guidance, size=size, seed=0)
        return group_rollout(
            self.model,
            sampler,
            self._prompts,
            branches,
            settings,
            group_size=given.group,
            step=0,
            stochastic_steps=(0,),
        )

    def _rolled(self, trajectory: Any, branches: Branches) -> Rollout:
        given = self.dimensions
        return Rollout(
            settings=self._settings,
            prompts=self._prompts,
            images=torch.zeros(given.group * given.prompts, 3, 1, 1),  # on the host by now
            trajectory=trajectory,
            sigmas=self.model.sigmas(given.steps),
            conditioning=branches.repeat_interleave(given.group).conditional,
            unconditional=None,
            members=tuple(range(given.group)) * given.prompts,
            iteration=0,
            seed=0,
        )

    def _loss(self, rolled: Rollout) -> Tensor:
        given = self.dimensions
        objective = Clipped(micro_batch_size=given.micro_batch)
        samples = given.group * given.prompts
        pairs = next(iter(micro_batches(samples, 1, given.micro_batch)))
        return objective.loss(self.model, rolled, torch.zeros(samples), pairs, {}, samples)[0]
