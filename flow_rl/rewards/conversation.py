r"""Rubric, prompt and images as a chat, and the chat as tensors.

    system     the rubric: fixed, so its keys and values are shared by all samples of a batch
    user       the prompt, then the image; for edits the instruction, the source image, the edited image
    assistant  <reasoning>\nScore: <digit>

Text comes before the first image so that a group, which has its prompt in common, shares that as well.

Shapes: N samples, L tokens of the longest, H height, W width, A tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flow_rl.rewards.readout import DIRECT_TEMPLATE, SCORE_TEMPLATE, digit_token_ids
from flow_rl.rewards.rubrics import Rubric

if TYPE_CHECKING:
    from transformers import ProcessorMixin

#: label of a token that no loss looks at
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Question:
    """One image to judge.

    Attributes:
        rubric: what to judge.
        prompt: what the image was generated from; for edits, the instruction.
        image: uint8, shape (3, H, W).
        source: for edits, the source image, uint8, shape (3, H', W').
    """

    rubric: Rubric
    prompt: str
    image: Tensor
    source: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rubric.task == "edit" and self.source is None:
            raise ValueError(
                f"The rubric '{self.rubric.name}' judges edits, but no source image came with '{self.prompt:.60}'."
            )

    @property
    def images(self) -> list[Tensor]:
        """The images in the order in which the chat shows them."""
        if self.rubric.task != "edit":
            return [self.image]
        assert self.source is not None, "refused above"
        return [self.source, self.image]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the assistant's turn is trained to be.

    Attributes:
        reasoning: text before the score; "" for an answer that is the score alone.
        digit: 1..5; None where no score is known (preference data): then the turn ends before the digit.
    """

    reasoning: str
    digit: int | None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Questions as the model reads them, not padded yet.

    Attributes:
        input_ids: token ids of each question up to where the assistant begins; length N.
        images: the model's own image inputs (`pixel_values`, `image_grid_thw`), flat over all images.
    """

    input_ids: tuple[list[int], ...]
    images: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """A padded batch with its labels.

    Attributes:
        model_inputs: everything that the model's forward takes. Padded on the left, so answers end together and logits
            are needed for the last `labels.shape[1]` predictions only.
        labels: next-token labels of these predictions, `IGNORED` where there is no loss, int64, shape (N, A).
        digit_index: which of the predictions is the score's, int64, shape (N,).
    """

    model_inputs: dict[str, Any]
    labels: Tensor
    digit_index: Tensor


def messages(question: Question) -> list[dict[str, Any]]:
    """The chat up to the assistant's turn, as `apply_chat_template` takes it."""
    prompt = _plain(question.prompt)
    image = {"type": "image"}
    if question.rubric.task == "edit":
        opening = {"type": "text", "text": f"Instruction: {prompt}\nSource image: "}
        content = [opening, image, {"type": "text", "text": "\nEdited image: "}, image]
    else:
        content = [{"type": "text", "text": f"Prompt: {prompt}\nImage: "}, image]
    return [
        {"role": "system", "content": [{"type": "text", "text": question.rubric.system_text}]},
        {"role": "user", "content": content},
    ]


def encode_questions(processor: ProcessorMixin, questions: Sequence[Question]) -> Encoded:
    """Tokens and image patches of the questions.

    Args:
        processor: of Qwen3-VL or Qwen2.5-VL.
        questions: N of them; images may differ in size.
    """
    flat = [image for question in questions for image in question.images]
    features = processor.image_processor(images=flat, return_tensors="pt", input_data_format="channels_first")
    slots = (features["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).tolist()
    texts, used = [], 0
    for question in questions:
        text = processor.apply_chat_template(messages(question), tokenize=False, add_generation_prompt=True)
        # One placeholder an image becomes one an image token, as the processor itself does (three times slower).
        pieces = text.split(processor.image_token)
        assert len(pieces) == len(question.images) + 1
        for count, piece in zip(slots[used : used + len(question.images)], pieces[1:], strict=True):
            pieces[0] += processor.image_token * count + piece
        texts.append(pieces[0])
        used += len(question.images)
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    images = {"pixel_values": features["pixel_values"], "image_grid_thw": features["image_grid_thw"]}
    return Encoded(input_ids=tuple(ids), images=images)


def training_inputs(
    processor: ProcessorMixin, questions: Sequence[Question], answers: Sequence[Answer]
) -> TrainingInputs:
    """A batch to learn from: labels on the assistant's turn alone.

    The template `Score: ` of an answer without reasoning carries no label: it is always given, never asked for, so
    a model can learn both kinds of answer without having to guess which one is wanted.

    Args:
        processor: of the model.
        questions: N of them.
        answers: one a question.
    """
    encoded = encode_questions(processor, questions)
    turns = [_turn(processor, answer) for answer in answers]
    length = max(len(labels) for _, labels, _ in turns)
    rows, all_labels, positions = [], [], []
    for question_ids, (ids, labels, index) in zip(encoded.input_ids, turns, strict=True):
        rows.append(question_ids + ids)
        all_labels.append([IGNORED] * (length - len(labels)) + labels)
        positions.append(length - len(labels) + index)
    inputs = pad_left(rows, pad_id=processor.tokenizer.pad_token_id, image_token_id=processor.image_token_id)
    return TrainingInputs(
        model_inputs=inputs | encoded.images | {"logits_to_keep": length},
        labels=torch.tensor(all_labels),
        digit_index=torch.tensor(positions),
    )


def pad_left(rows: Sequence[list[int]], *, pad_id: int, image_token_id: int) -> dict[str, Tensor]:
    """Token ids of unequal length as `input_ids`, `attention_mask` and `mm_token_type_ids`, each int64 (N, L)."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image_token_id).long() * mask}


def _turn(processor: ProcessorMixin, answer: Answer) -> tuple[list[int], list[int], int]:
    """Tokens that follow the question, labels of the predictions from its last token on, and the digit's index.

    The first label belongs to the prediction at the question's last token, so there is one more than tokens are fed.
    """
    tokenizer = processor.tokenizer
    reasoning = _plain(answer.reasoning).strip()
    template = reasoning + SCORE_TEMPLATE if reasoning else DIRECT_TEMPLATE
    ids = tokenizer.encode(template, add_special_tokens=False)
    labels = list(ids) if reasoning else [IGNORED] * len(ids)
    index = len(ids)
    if answer.digit is None:
        return ids, [*labels, IGNORED], index
    digit = digit_token_ids(tokenizer)[answer.digit - 1]
    return [*ids, digit], [*labels, digit, tokenizer.eos_token_id], index


def _plain(text: str) -> str:
    """The text with nothing in it that the tokenizer takes for a control token: a prompt must not end its turn."""
    return text.replace("<|", "< |")
