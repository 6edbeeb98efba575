"""Let a vision-language model answer, and read the score off its answer: the one way used in validation and in RL.

Greedy decoding with a KV cache. What the questions of a batch have in common before their first image (the
rubric, and the prompt within a group) is computed once and its keys and values are shared. Each row's positions are
its own, padding is masked, so an answer depends on nothing else in its batch.

Shapes: N questions, B rows of a chunk, P tokens of the shared prefix, S tokens of the longest rest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from flow_rl.rewards.conversation import Encoded, Question, encode_questions, pad_left
from flow_rl.rewards.readout import (
    DIRECT_TEMPLATE,
    SCORE_TEMPLATE,
    apply_cap,
    digit_token_ids,
    ends_before_digit,
    expected_score,
)


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How answers are made and read."""

    reasoning: bool = True
    """Let the model reason before the score; false reads the score at once, after a given `Score: ` (cheap)."""
    max_new_tokens: int = 256
    """Most tokens of reasoning; one that is cut off gets its score on the second attempt."""
    batch_size: int = 32
    """Questions answered at a time; bounds memory, changes nothing else."""
    max_outside: float = 0.5
    """Most probability outside of the five digits at the score's position; with more, the answer counts as
    unreadable: NaN."""
    cap: bool = True
    """Apply the rubric's cap where the reasoning says that the top criterion failed."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"reading.{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.max_outside <= 1:
            raise ValueError(f"reading.max_outside is {self.max_outside}; it must lie in (0, 1].")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers to N questions.

    Attributes:
        scores: in [1, 5], NaN where none could be read, float32 (N,), on the CPU.
        outside_mass: probability outside of the digits at the score's position, float32 (N,).
        reasoning: what was written before the score; "" without reasoning. Length N.
        retried: true where the first attempt had no score line and the template was given, bool (N,).
    """

    scores: Tensor
    outside_mass: Tensor
    reasoning: tuple[str, ...]
    retried: Tensor

    @property
    def parsed(self) -> Tensor:
        """Where a score could be read, bool (N,)."""
        return ~self.scores.isnan()


class ScoreReader:
    """Asks a model.

    The retry: where the first attempt ends, or is cut off, without a score line, the reasoning is kept, the score
    line's beginning is put after it, and the model's own digit distribution is read there. The score is thus still the
    model's; if most of its probability lies on other tokens than digits, there is no score.

    Args:
        model: Qwen3-VL or Qwen2.5-VL, on the device that is to be used.
        processor: of the model.
        settings: how to read.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, settings: ReadingSettings) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.digits = digit_token_ids(processor.tokenizer)

    @torch.no_grad()
    def read(self, questions: Sequence[Question]) -> Answers:
        """Answer every question."""
        size = self.settings.batch_size
        with _evaluating(self.model):
            parts = [self._read_chunk(questions[i : i + size]) for i in range(0, len(questions), size)]
        return Answers(
            scores=torch.cat([p.scores for p in parts]) if parts else torch.zeros(0),
            outside_mass=torch.cat([p.outside_mass for p in parts]) if parts else torch.zeros(0),
            reasoning=tuple(text for p in parts for text in p.reasoning),
            retried=torch.cat([p.retried for p in parts]) if parts else torch.zeros(0, dtype=torch.bool),
        )

    def _read_chunk(self, questions: Sequence[Question]) -> Answers:
        encoded = encode_questions(self.processor, questions)
        count = len(questions)
        scores, outside = torch.full((count,), torch.nan), torch.full((count,), torch.nan)
        written: list[list[int]] = [[] for _ in questions]
        retried = torch.zeros(count, dtype=torch.bool)
        if self.settings.reasoning:
            written = self._write(encoded, scores, outside)
            retried = scores.isnan()
        missing = [i for i in range(count) if scores[i].isnan()]
        if missing:
            template = SCORE_TEMPLATE if self.settings.reasoning else DIRECT_TEMPLATE
            forced = self.processor.tokenizer.encode(template, add_special_tokens=False)
            rest = _select(encoded, questions, missing, [written[i] + forced for i in missing])
            scores[missing], outside[missing] = self._expected(self._prefill(rest)[0])
        reasoning = tuple(self._text(ids).removesuffix(SCORE_TEMPLATE).strip() for ids in written)
        scores[outside > self.settings.max_outside] = torch.nan
        if self.settings.cap:
            for i, question in enumerate(questions):
                rubric = question.rubric
                capped = apply_cap(float(scores[i]), reasoning[i], phrase=rubric.cap_phrase, cap=rubric.cap_score)
                scores[i] = capped
        return Answers(scores=scores, outside_mass=outside, reasoning=reasoning, retried=retried)

    def _write(self, encoded: Encoded, scores: Tensor, outside: Tensor) -> list[list[int]]:
        """Decode greedily; fills in the scores that the answers give and returns the tokens before each."""
        logits, cache, mask, positions = self._prefill(encoded)
        end = self.processor.tokenizer.eos_token_id
        written: list[list[int]] = [[] for _ in encoded.input_ids]
        open_rows = set(range(len(written)))
        for _ in range(self.settings.max_new_tokens + 1):
            tokens = logits.argmax(-1)
            scored: list[int] = []
            for row, token in enumerate(tokens.tolist()):  # the one wait for the device a token
                if row not in open_rows:
                    continue
                if token in self.digits and ends_before_digit(self._text(written[row])):
                    scored.append(row)
                    open_rows.discard(row)
                elif token == end or len(written[row]) == self.settings.max_new_tokens:
                    open_rows.discard(row)
                else:
                    written[row].append(token)
            if scored:
                expected, mass = self._expected(logits)
                scores[scored], outside[scored] = expected[scored], mass[scored]
            if not open_rows:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions[None, :, None].expand(3, -1, 1),
                past_key_values=cache,
                use_cache=True,
            )
            logits, positions = output.logits[:, -1], positions + 1
        return written

    def _prefill(self, encoded: Encoded) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """Feed the questions.

        Returns:
            Logits of the next token (B, V); the cache of P + S tokens; its mask (B, P + S); the next position (B,).
        """
        device, rows = self.model.device, encoded.input_ids
        tokenizer, image = self.processor.tokenizer, self.processor.image_token_id
        shared = shared_prefix(rows, stop=image)
        rest = pad_left([row[shared:] for row in rows], pad_id=tokenizer.pad_token_id, image_token_id=image)
        prefix = torch.tensor([rows[0][:shared]], dtype=torch.long)
        ids = torch.cat([prefix.expand(len(rows), -1), rest["input_ids"]], dim=1).to(device)
        mask = torch.cat([torch.ones(len(rows), shared, dtype=torch.long), rest["attention_mask"]], dim=1).to(device)
        images = {name: tensor.to(device) for name, tensor in encoded.images.items()}
        positions, _ = self.model.model.get_rope_index(
            ids, (ids == image).long(), image_grid_thw=images["image_grid_thw"], attention_mask=mask
        )
        cache = DynamicCache(config=self.model.config)
        if shared:
            self.model(
                input_ids=ids[:1, :shared],
                position_ids=positions[:, :1, :shared],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(len(rows))
        output = self.model(
            input_ids=ids[:, shared:],
            attention_mask=mask,
            position_ids=positions[:, :, shared:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        return output.logits[:, -1], cache, mask, positions.amax(dim=(0, 2)) + 1

    def _expected(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        score, mass = torch.stack(expected_score(logits, self.digits)).cpu().unbind()
        return score, mass

    def _text(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def shared_prefix(rows: Sequence[list[int]], *, stop: int) -> int:
    """How many tokens all rows begin with in common, up to their first `stop` and at least one short of every row."""
    shortest = min(len(row) for row in rows) - 1
    first = rows[0]
    for i in range(shortest):
        if first[i] == stop or any(row[i] != first[i] for row in rows):
            return i
    return shortest


def _select(encoded: Encoded, questions: Sequence[Question], index: list[int], endings: list[list[int]]) -> Encoded:
    """The questions at `index`, each followed by its ending."""
    grids = encoded.images["image_grid_thw"]
    counts = [len(question.images) for question in questions]
    patches = encoded.images["pixel_values"].split(grids.prod(-1).tolist())
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    kept = [image for i in index for image in range(starts[i], starts[i] + counts[i])]
    return Encoded(
        input_ids=tuple(encoded.input_ids[i] + ending for i, ending in zip(index, endings, strict=True)),
        images={"pixel_values": torch.cat([patches[k] for k in kept]), "image_grid_thw": grids[kept]},
    )


@contextmanager
def _evaluating(model: PreTrainedModel):
    """The model in evaluation mode, and afterwards as it was, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
