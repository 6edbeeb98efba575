"""How many tokens a prompt has, so that no generator reads less of it, or more, than it was meant to.

A prompt's tokens are counted with those that close its turn in the chat template, as the `max_sequence_length` of
diffusers' pipelines counts them: both reach the transformer. The system message does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: tokens of a prompt unless a family or a setting says otherwise: the most that diffusers' Qwen-Image pipelines take
DEFAULT_LIMIT = 1024
#: what follows a prompt in the chat templates of all families
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
#: most tokens of `CLOSING` and of the line break before a prompt: two special tokens, and the bytes of the rest
_CLOSING_TOKENS = 14
#: bytes that normalisation (NFC) makes of one at most (Unicode Standard Annex 15)
_NORMALISED = 3


def most_tokens(text: str) -> int:
    """An upper bound of a prompt's tokens without a tokenizer: each token of a byte-level one has at least a byte."""
    size = len(text) if text.isascii() else _NORMALISED * len(text.encode("utf-8", errors="replace"))
    return size + _CLOSING_TOKENS


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each prompt.

    Args:
        tokenizer: of the generator's text encoder, with the interface of `transformers`.
        texts: prompts or instructions.
    """
    # The line break before the prompt belongs to the template, and may share a token with the prompt's first ones.
    framed = [f"\n{text or ' '}{CLOSING}" for text in texts]
    rows = tokenizer(framed, add_special_tokens=False, verbose=False)["input_ids"]
    return [len(row) - 1 for row in rows]


def too_long(texts: Sequence[str], limit: int, tokenizer: Callable[[], Any]) -> dict[int, int]:
    """Tokens of the prompts that have more than `limit` of them, by position.

    Args:
        texts: prompts or instructions.
        limit: most tokens of a prompt.
        tokenizer: makes the tokenizer. Called only where a prompt may be too long.
    """
    rows = [row for row, text in enumerate(texts) if most_tokens(text) > limit]
    if not rows:
        return {}
    counts = count_tokens(tokenizer(), [texts[row] for row in rows])
    return {row: count for row, count in zip(rows, counts, strict=True) if count > limit}


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a generator in the diffusers layout, without its weights; None where the directory has none."""
    from transformers import AutoTokenizer  # takes seconds, and short prompts need none

    for part in ("tokenizer", "processor"):
        if (directory / part / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(str(directory / part))
    return None
