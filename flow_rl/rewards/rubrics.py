"""What a reward model is asked to judge: a text with a name, a version and a hash.

A fine-tuned model knows the rubric it was trained with and no other, so the hash travels with the exported model
and a rubric that differs is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from flow_rl.strict_yaml import Scalar, parse, read_text
from flow_rl.suggestions import nearest

RUBRIC_DIRECTORY = Path(__file__).parent / "rubrics"
Task = Literal["t2i", "edit"]


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """One dimension to judge.

    Attributes:
        name: of the dimension, such as `alignment`.
        version: raised whenever the text changes its meaning.
        task: `t2i` shows the model a prompt and an image; `edit` a source image, an instruction and an image.
        text: the criteria and the scale, the fixed beginning of every conversation.
        reasoning_hint: how to write the answer; follows the text.
        cap_phrase: what the reasoning says where the top criterion failed; None for a rubric without a cap. It must
            occur in the text or the hint, or the model could not know it.
        cap_score: the highest score left then; None without a phrase.
    """

    name: str
    version: int
    task: Task
    text: str
    reasoning_hint: str = ""
    cap_phrase: str | None = None
    cap_score: float | None = None

    def __post_init__(self) -> None:
        where = f"Rubric '{self.name}'"
        if self.task not in get_args(Task):
            raise ValueError(f"{where}: task must be one of {', '.join(get_args(Task))}, received {self.task!r}.")
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"{where}: a name has letters, digits and underscores alone: it becomes a metric's name.")
        if not self.text.strip():
            raise ValueError(f"{where}: the text is blank; it must say what earns which score.")
        if (self.cap_phrase is None) != (self.cap_score is None):
            raise ValueError(f"{where}: cap_phrase and cap_score go together; give both or neither.")
        if self.cap_score is not None and not 1 <= self.cap_score <= 5:
            raise ValueError(f"{where}: cap_score is {self.cap_score}; it must lie on the scale 1..5.")
        if self.cap_phrase is not None and self.cap_phrase.casefold() not in self.system_text.casefold():
            raise ValueError(
                f"{where}: the cap phrase '{self.cap_phrase}' is nowhere in its text, so no answer would ever use it."
            )

    @property
    def system_text(self) -> str:
        """What the model reads first: the text and the hint."""
        return "\n\n".join(part.strip() for part in (self.text, self.reasoning_hint) if part.strip())

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the content; blanks at the ends do not count."""
        content = asdict(self) | {"text": self.text.strip(), "reasoning_hint": self.reasoning_hint.strip()}
        if content["cap_score"] is not None:
            content["cap_score"] = float(content["cap_score"])  # 2 and 2.0 are the same cap
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Rubric:
        """A shipped rubric by its name, or any other by the path of its YAML file.

        Raises:
            ValueError: no such rubric, not YAML, or a key that is missing, unknown or of the wrong type.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = RUBRIC_DIRECTORY / f"{name_or_path}.yaml"
        if not path.is_file():
            known = [p.stem for p in sorted(RUBRIC_DIRECTORY.glob("*.yaml"))]
            hint = nearest(path.stem, known)
            raise ValueError(
                f"No rubric '{name_or_path}'.{hint} Shipped are {', '.join(known)}; give the path of a .yaml file for "
                "one of your own."
            )
        return cls.from_dict(parse(read_text(path), str(path)), where=f"'{path}'")

    @classmethod
    def from_dict(cls, content: Any, *, where: str) -> Rubric:
        """A rubric from plain values, as a YAML or JSON file holds them.

        Args:
            content: the fields by name.
            where: the file, for messages.

        Raises:
            ValueError: see `load`.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: expected the keys name, version, task and text, received {content!r:.60}.")
        known = [f.name for f in fields(cls)]
        for key in content:
            if key not in known:
                raise ValueError(f"{where}: unknown key '{key}'.{nearest(str(key), known)}")
        content = dict(content)
        kinds: dict[str, type | tuple[type, ...]] = {
            "name": str, "version": int, "task": str, "text": str,
            "reasoning_hint": str, "cap_phrase": (str, type(None)), "cap_score": (int, float, type(None)),
        }  # fmt: skip
        for key, kind in kinds.items():
            if key in content:
                content[key] = str(content[key]) if kind is str and isinstance(content[key], str) else content[key]
                content[key] = content[key].value if isinstance(content[key], Scalar) else content[key]
                if not isinstance(content[key], kind):
                    raise ValueError(f"{where}: '{key}' has the wrong type, received {content[key]!r:.60}.")
            elif key in known[:4]:
                raise ValueError(f"{where}: no '{key}'; a rubric needs {', '.join(known[:4])}.")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields and the hash, as plain values."""
        return asdict(self) | {"hash": self.hash}


def load_rubrics(rubrics: Mapping[str, str]) -> dict[str, Rubric]:
    """Rubrics by dimension.

    Args:
        rubrics: the name or path of a rubric by dimension.

    Raises:
        ValueError: see `Rubric.load`; none given; a rubric under another name than its own.
    """
    if not rubrics:
        raise ValueError("model.rubrics is empty: name at least one, such as {alignment: alignment}.")
    loaded = {dimension: Rubric.load(path) for dimension, path in rubrics.items()}
    for dimension, rubric in loaded.items():
        if rubric.name != dimension:
            raise ValueError(
                f"model.rubrics.{dimension} is the rubric '{rubric.name}'. The data name dimensions by the rubric's "
                f"own name: write {rubric.name}: {rubrics[dimension]}."
            )
    return loaded
