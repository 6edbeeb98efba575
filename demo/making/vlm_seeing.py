"""Teaches the vision tower to see before the language model is there to ask.

A network this small learns to see much more slowly than to talk, and most of what a language model costs is spent on
the text. So at first each nameable attribute has a slot: a learnt query pools the 16 image tokens, a gate picks the
slot's channels, and the result is compared with the language model's own word embeddings. What an image shows then
stands in its tokens in the words that the language model reads, and it is left to learn where to look.

Shapes: N images, P = 64 patches, T = 16 image tokens an image, D channels of the language model, S slots, V words.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from demo.annotation.judgements import IDENTITY
from demo.making.vlm_pool import Pool, imitated
from demo.world.looks import LOOKS, look_of
from demo.world.vocabulary import ATTRIBUTES, CATEGORIES, LETTERS, MAX_LETTERS
from demo.world.world import Scene, keyed_rng

_SEEING_STREAM = 37
IGNORED = -100


def _slots() -> list[tuple[str, str]]:
    """(category, attribute) of each slot; the first is the category itself, a text has one slot a letter."""
    slots = [("", "category")]
    for category in CATEGORIES:
        for attribute in ATTRIBUTES[category]:
            if attribute.name == "text":
                slots += [(category, f"letter {place}") for place in range(MAX_LETTERS)]
            else:
                slots.append((category, attribute.name))
    return slots + [(category, IDENTITY) for category in LOOKS]


SLOTS = _slots()
WORDS = tuple(
    dict.fromkeys(["none", *CATEGORIES, *(v for c in CATEGORIES for a in ATTRIBUTES[c] for v in a.values), *LETTERS])
)


def targets(scenes: Sequence[Scene]) -> Tensor:
    """Index of the true word of each slot, int64 (N, S); `IGNORED` for the slots of other categories."""
    rows = []
    for scene in scenes:
        shown = {name: value for name, value in scene.attributes.items() if name != "text"}
        text = scene.attributes.get("text", "")
        shown |= {f"letter {place}": text[place] for place in range(len(text))}
        if scene.category in LOOKS:
            shown[IDENTITY] = look_of(scene)
        row = [WORDS.index(scene.category)]
        for category, name in SLOTS[1:]:
            row.append(WORDS.index(shown.get(name, "none")) if category == scene.category else IGNORED)
        rows.append(row)
    return torch.tensor(rows)


class SlotReader(nn.Module):
    """Reads every slot's word off the image tokens; thrown away afterwards.

    Args:
        embeddings: of the language model's vocabulary, (vocabulary, D); trained along.
        word_ids: token of each of `WORDS`.
    """

    def __init__(self, embeddings: nn.Embedding, word_ids: Sequence[int]) -> None:
        super().__init__()
        width = embeddings.embedding_dim
        self.embeddings = embeddings
        self.register_buffer("word_ids", torch.tensor(word_ids))
        self.queries = nn.Parameter(torch.randn(len(SLOTS), width) * width**-0.5)
        self.places = nn.Parameter(torch.zeros(len(SLOTS), 16))
        self.gates = nn.Parameter(1 + 0.5 * torch.randn(len(SLOTS), width))
        self.norm = nn.RMSNorm(width)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, S, V) of image tokens (N, T, D)."""
        tokens = self.norm(tokens)
        attention = (torch.einsum("ntd,sd->nst", tokens, self.queries) + self.places).softmax(-1)
        pooled = torch.einsum("nst,ntd->nsd", attention, tokens) * self.gates
        return self.project(pooled) @ self.embeddings(self.word_ids).T


def word_tokens(processor: Qwen3VLProcessor) -> list[int]:
    """The token of each of `WORDS` as it stands inside a sentence, with a blank before it."""
    found = [processor.tokenizer.encode(f" {word}", add_special_tokens=False) for word in WORDS]
    split = [word for word, ids in zip(WORDS, found, strict=True) if len(ids) != 1]
    if split:
        raise ValueError(f"The tokenizer splits {', '.join(split)}: train it on `demo.making.vlm_tasks.corpus`.")
    return [ids[0] for ids in found]


def image_tokens(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, images: Tensor) -> Tensor:
    """Image tokens (N, T, D) of uint8 images (N, 3, H, W)."""
    features = processor.image_processor(images=list(images), return_tensors="pt", input_data_format="channels_first")
    seen = model.model.visual(features["pixel_values"], features["image_grid_thw"]).pooler_output
    return seen.view(len(images), -1, seen.shape[-1])


def accuracy(logits: Tensor, wanted: Tensor) -> float:
    """Share of the slots that are read right."""
    known = wanted != IGNORED
    return (logits.argmax(-1) == wanted)[known].float().mean().item()


def build_reader(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, seed: int) -> SlotReader:
    """A reader with random weights of its own; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SlotReader(model.get_input_embeddings(), word_tokens(processor))


def seeing_loss(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    reader: SlotReader,
    pool: Pool,
    wanted_N: Tensor,
    rng: np.random.Generator,
    batch: int,
) -> tuple[Tensor, float]:
    """Cross-entropy of the slots of a batch of pictures, and the share that is read right.

    Args:
        model: whose vision tower sees.
        processor: of the model.
        reader: of its image tokens.
        pool: to draw from.
        wanted_N: `targets` of the pool's scenes.
        rng: decides which pictures, and how they are imitated.
        batch: pictures.
    """
    rows = rng.integers(len(pool.scenes), size=batch)
    logits = reader(image_tokens(model, processor, imitated(pool.images[rows], rng)))
    wanted = wanted_N[rows]
    loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
    return loss, accuracy(logits, wanted)


def teach_seeing(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    pool: Pool,
    held_out: Pool,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> float:
    """Train the vision tower, its merger and the word embeddings.

    Args:
        model: trained in place.
        processor: of the model.
        pool: to train on.
        held_out: to measure on.
        steps: optimizer steps.
        batch: images a step.
        lr: peak learning rate.
        seed: of everything drawn.

    Returns:
        accuracy on clean held-out renders.
    """
    reader = build_reader(model, processor, seed)
    parameters = [*model.model.visual.parameters(), *reader.parameters()]
    # The deepest features alone are read here, so the intermediate ones get no gradient.
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    wanted_N = targets(pool.scenes)
    start, model_was = time.perf_counter(), model.training
    model.train()
    for step in range(steps):
        rng = keyed_rng(seed, step, _SEEING_STREAM)
        loss, correct = seeing_loss(model, processor, reader, pool, wanted_N, rng, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            spent = time.perf_counter() - start
            print(
                f"seeing {step + 1:5d}/{steps}  loss {loss.item():.3f}  accuracy {correct:.3f}  "
                f"{(step + 1) * batch / spent:.0f} images/s  {spent:.0f} s",
                flush=True,
            )
    model.train(model_was)
    found = _measure(model, processor, reader, held_out)
    print(f"seeing: held-out accuracy {found:.3f}", flush=True)
    return found


@torch.no_grad()
def _measure(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, reader: SlotReader, pool: Pool
) -> float:
    images = torch.from_numpy(pool.images).permute(0, 3, 1, 2).contiguous()
    logits = torch.cat([reader(image_tokens(model, processor, part)) for part in images.split(64)])
    return accuracy(logits, targets(pool.scenes))
