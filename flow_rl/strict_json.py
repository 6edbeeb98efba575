"""JSON as its standard has it: no key twice in an object, and no NaN or infinity for a number."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class RepeatedKeyError(ValueError):
    """An object that has a key twice, of which a parser would keep the last without a word.

    Args:
        key: the first such key.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!a:.80} is written twice")
        self.key = key


class NoNumberError(ValueError):
    """A word that Python's parser takes for a number, and JSON does not.

    Args:
        word: NaN, Infinity or -Infinity.
    """

    def __init__(self, word: str) -> None:
        super().__init__(f"{word} is no JSON number")
        self.word = word


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: no JSON.
        RepeatedKeyError: a key twice in an object.
        NoNumberError: NaN or an infinity.
        ValueError: an integer of thousands of digits.
        RecursionError: values that are nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


def _no_number(word: str) -> NoReturn:
    raise NoNumberError(word)
