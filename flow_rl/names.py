"""Names that users give to categories, rewards and dimensions: which ones tables, tags and file names can bear."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from flow_rl.errors import SettingError

#: words that stand for something else wherever categories and rewards are listed: a mean over them, all of them, and
#: the row of a weight table for those without one of their own
RESERVED = ("mean", "all", "default")
#: characters of one name: tags and file names are made of several
LONGEST_NAME = 100


def why_no_name(name: object) -> str | None:
    """Why something cannot be the name of a category, reward or dimension; None where it can.

    Args:
        name: as the user wrote it.

    Returns:
        A sentence with what to do, to be put behind what the name is for.
    """
    if not isinstance(name, str):
        return f"it must be a text, received {name!r:.80}."
    if (found := bad_character(name)) or (found := _line_break(name)):
        return f"{name!a:.80} holds {found}: remove it."
    if is_blank(name):
        return "it is blank: give it a word."
    if name != name.strip():
        return f"'{name:.80}' begins or ends with a blank: remove it."
    if name in RESERVED:
        return f"'{name}' is reserved (it stands for something else in tables and logs): choose another word."
    if "/" in name or "\\" in name:
        return f"'{name:.80}' holds a slash, which divides tags and paths: write another character, such as '-'."
    if name in (".", ".."):
        return f"'{name}' is a directory to every file system: choose a word."
    if len(name) > LONGEST_NAME:
        return f"'{name:.40}...' has {len(name)} characters; at most {LONGEST_NAME} fit into tags and tables."
    return None


def check_names(section: str, names: Iterable[object]) -> None:
    """Refuse names that `why_no_name` complains of.

    Args:
        section: of the config that has them, such as `model.rewards`.
        names: as the user wrote them.

    Raises:
        SettingError: naming the section and the first bad name.
    """
    for name in names:
        if why := why_no_name(name):
            raise SettingError(f"{section} has a name that can't be used: {why}")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: blanks, control characters and marks of zero width alone."""
    return not any(unicodedata.category(character)[0] not in "ZC" for character in text)


def bad_character(text: str) -> str | None:
    """The first character that no tokenizer or file can take as text, with its place; None where all are fine.

    These are halves of surrogate pairs, which cannot be encoded, and control characters other than tab and line ends,
    which come from damaged files.
    """
    if text.isascii() and text.isprintable():
        return None
    for place, character in enumerate(text, 1):
        code = ord(character)
        if 0xD800 <= code < 0xE000:
            return (
                f"half a character (a lone surrogate U+{code:04X}, as cutting an emoji leaves it) at character {place}"
            )
        if (code < 32 and character not in "\t\n\r") or (0x7F <= code < 0xA0 and code != 0x85):
            return f"the control character U+{code:04X} at character {place}"
    return None


def same_tag(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of different names that a file system or a reader may take for one: they differ in case or form alone."""
    first: dict[str, str] = {}
    found = []
    for name in dict.fromkeys(names):
        other = first.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            found.append((other, name))
    return found


def _line_break(name: str) -> str | None:
    return "a tab or a line break" if any(c in name for c in "\t\n\r\x85\u2028\u2029") else None
