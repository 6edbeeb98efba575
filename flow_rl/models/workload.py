"""What one iteration asks of a generator: how many forwards, on how many samples at a time, and what is kept meanwhile.

A stage states these numbers itself, before it has weights. `flow_rl.planning` turns them into bytes and operations.

Shapes: G images a prompt, T denoising steps, K trained (sample, step) pairs a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flow_rl.models.adapters import LoraSettings
from flow_rl.models.image_model import Conditioning, ImageModel
from flow_rl.models.loading import peek_grid
from flow_rl.models.memory import FrozenDtype, WeightDtypes

#: text tokens assumed of a prompt, template included, where nothing has been tokenised
TEXT_TOKENS = 128

#: builds the inputs of a micro-batch on the meta device, and returns the function that computes its loss from the
#: generator, the conditional and, under guidance in the loss, the unconditional branch
Loss = Callable[[ImageModel, Conditioning, Conditioning | None], Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """The image generator that a stage trains.

    Attributes:
        model_path: a directory in the diffusers layout, or a hub id.
        image_size: height and width in pixels.
        lora: settings of the adapter that is trained; None trains all of the transformer.
        frozen_dtype: of weights that are not trained.
        gradient_checkpointing: whether the stage recomputes activations in the backward pass.
        max_prompt_tokens: most tokens of a prompt; None leaves it to the model.
    """

    model_path: str
    image_size: int
    lora: LoraSettings | None = None
    frozen_dtype: FrozenDtype = "float32"
    gradient_checkpointing: bool = False
    max_prompt_tokens: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image_size, self.image_size

    @property
    def tokens(self) -> int:
        """Latent tokens of an image, by the configs of the model."""
        return math.prod(peek_grid(self.model_path, self.size))

    @property
    def dtypes(self) -> WeightDtypes:
        """How the weights rest in memory, adapters aside."""
        return WeightDtypes.kept(self.frozen_dtype, adapter=self.lora is not None)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Forwards of one kind in an iteration, on one rank.

    Attributes:
        name: of the phase.
        evaluations: samples times denoising evaluations.
        backward: whether a backward pass follows.
    """

    name: str
    evaluations: int
    backward: bool = False


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Images drawn outside the rollouts.

    Attributes:
        name: of the occasion.
        prompts: distinct prompts, over all ranks.
        members: images a prompt.
        keeps_latents: whether the latents of the iteration are kept meanwhile.
        keeps_weights: whether a copy of the trained weights is kept meanwhile.
        swaps_weights: whether the weights are exchanged one by one for an average of them.
    """

    name: str
    prompts: int
    members: int = 1
    keeps_latents: bool = False
    keeps_weights: bool = False
    swaps_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings that cut an iteration into parts without changing what is learnt.

    Attributes:
        micro_batch: setting of the pairs of one backward.
        rollout_batch: setting of the images denoised at a time.
    """

    micro_batch: str
    rollout_batch: str


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Generators that are evaluated at the trained states.

    Attributes:
        copies: whole transformers that the teachers have besides the trained one; one at a time is on the device.
        sharded: whether they are divided over the ranks as the trained transformer is.
        guided: whether a teacher evaluates the unconditional branch too.
    """

    copies: int
    sharded: bool
    guided: bool


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One iteration.

    Attributes:
        groups: prompts an iteration, over all ranks.
        group_size: G.
        ranks: of the run.
        updates: optimizer steps an iteration.
        pairs: (sample, step) pairs of one update, over all ranks.
        micro_batch: pairs of one backward.
        rollout_batch: images of one rollout that are denoised at a time.
        batch_size: images denoised at a time on other occasions.
        phases: forwards on one rank.
        target: latent tokens of an image.
        source: latent tokens of a source image; 0 for text-to-image.
        kept_a_sample: latents that an iteration keeps of every sample from its rollout to its update.
        loss: of a micro-batch.
        options: the settings of `micro_batch` and `rollout_batch`.
        copies: names of the copies of the trained weights that the stage keeps.
        teachers: where there are any.
        guided_update: whether the loss evaluates the unconditional branch too.
        guided_drawings: whether drawings are guided.
        decodes: whether rollouts are decoded to images.
        encodes_all: whether all prompts of a rank are encoded at a time, rather than those of a rollout's batch.
        drawings: images drawn outside the rollouts.
        text: tokens of a prompt.
    """

    groups: int
    group_size: int
    ranks: int
    updates: int
    pairs: int
    micro_batch: int
    rollout_batch: int
    batch_size: int
    phases: tuple[Phase, ...]
    target: int
    source: int
    kept_a_sample: int
    loss: Loss
    options: Options
    copies: tuple[str, ...] = ()
    teachers: Teachers | None = None
    guided_update: bool = False
    guided_drawings: bool = False
    decodes: bool = True
    encodes_all: bool = False
    drawings: tuple[Drawing, ...] = ()
    text: int = TEXT_TOKENS

    @property
    def prompts_a_rank(self) -> int:
        """Prompts of one rank in an iteration."""
        return math.ceil(self.groups / self.ranks)

    @property
    def samples_a_rank(self) -> int:
        """Images that one rank makes an iteration."""
        return self.prompts_a_rank * self.group_size

    @property
    def accumulation(self) -> int:
        """Backwards that one rank adds up before an optimizer step."""
        return math.ceil(self.pairs / self.ranks / self.micro_batch)

    @property
    def prompts_a_rollout(self) -> int:
        """Distinct prompts among the images of a rollout that are denoised at a time."""
        return max(1, self.rollout_batch // self.group_size)

    @property
    def prompts_a_micro_batch(self) -> int:
        """Distinct prompts that a micro-batch can touch: pairs are ordered sample by sample, prompt by prompt."""
        pairs_a_prompt = max(1, self.pairs // max(1, self.groups))
        return max(1, math.ceil(self.micro_batch / pairs_a_prompt))

    def prompts_of(self, drawing: Drawing) -> int:
        """Distinct prompts that one rank draws at a time for a drawing: its share, and no more than fit a batch."""
        return max(1, min(math.ceil(drawing.prompts / self.ranks), self.batch_size // drawing.members))
