"""What travels between `RemoteReward` and the scoring service: JSON, with images as base64 PNG.

One JSON body holds a whole batch. Base64 makes it a third larger than multipart would, and buys one schema that both
sides validate, requests that a person can write with curl, and no second parser. Nothing is ever unpickled.

Images are quantised to 8 bits a channel: float images arrive within 1/510 of what was sent, and images that came from
8-bit files arrive bit for bit. NaN, which JSON lacks, travels as null.

Shapes: N samples, H height, W width.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from flow_rl.rewards.base import Reward
from flow_rl.rewards.png import HEADER_BYTES, read_header, read_pixels

#: header of every request and of its answer: who gets the answer to another request must notice
REQUEST_ID_HEADER = "X-Score-Request-Id"
#: longest name of a reward
MAX_NAME = 256
#: how much of what was sent a message repeats
QUOTED = 300
#: raised whenever either side stops understanding the other
PROTOCOL = 1


class _FirstFault(FailFast):
    """The first bad entry of a list ends the check: a million of them must not become a million errors."""

    def __hash__(self) -> int:  # so that the list can be optional
        return 0


Texts = Annotated[list[str], _FirstFault()]


class _Message(BaseModel):
    """Refuses unknown keys and converts nothing: a string is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    protocol: int = PROTOCOL

    @field_validator("protocol")
    @classmethod
    def _same_protocol(cls, value: int) -> int:
        if value != PROTOCOL:
            raise ValueError(f"received protocol {value}, this side speaks {PROTOCOL}: update the older of the two")
        return value


class ScoreRequest(_Message):
    """A batch for one reward of the service.

    Attributes:
        reward: its name there.
        images: base64 of one PNG a sample, 8-bit RGB.
        prompts: one a sample.
        categories: one a sample.
        sources: for edits, the source images, like `images`; None for text-to-image.
    """

    reward: Annotated[str, Field(max_length=MAX_NAME)]
    images: Texts
    prompts: Texts
    categories: Texts
    sources: Texts | None = None

    @model_validator(mode="after")
    def _same_lengths(self) -> ScoreRequest:
        lengths = {key: len(getattr(self, key)) for key in ("images", "prompts", "categories")}
        if self.sources is not None:
            lengths["sources"] = len(self.sources)
        if len(set(lengths.values())) > 1 or not self.images:
            raise ValueError(f"expected at least one sample and as many entries of each kind, received {lengths}")
        return self


class ScoreResponse(_Message):
    """Scores of a batch, and who gave them.

    Attributes:
        reward: its name.
        version: what the service says of the reward's version; None if the reward states none.
        rubric_hash: hash of the rubric it scores by; None if it has none.
        scores: one a sample, null where it could not be scored.
    """

    reward: str
    version: str | None = None
    rubric_hash: str | None = None
    scores: Annotated[list[float | None], _FirstFault()]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a reward scores by. A run whose scorer changes half-way is two runs."""

    version: str | None
    rubric_hash: str | None

    @classmethod
    def of(cls, reward: Reward) -> Identity:
        """The reward's own `version` and `rubric` (or `rubric_hash`), where it has them."""
        rubric = getattr(reward, "rubric", None)
        digest = getattr(rubric, "hash", None) or getattr(reward, "rubric_hash", None)
        version = getattr(reward, "version", None)
        return cls(version=None if version is None else str(version), rubric_hash=digest)


def read_token(variable: str | None) -> str | None:
    """The token that an environment variable holds; None where no variable is named.

    Raises:
        ValueError: the variable is not set, or what it holds cannot stand in a header.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not token:
        raise ValueError(
            f"The environment variable {variable} is not set; token_variable names the one that holds the token."
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"The environment variable {variable} must hold printable ASCII without spaces.")
    return token


def encode_png(image: Tensor) -> bytes:
    """PNG of one uint8 image, shape (3, H, W). Fast rather than small: it crosses a local network once."""
    buffer = io.BytesIO()
    # Run lengths alone are quicker to find than zlib's fastest level, and make filtered rows smaller, too.
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def encode_base64(image: Tensor) -> str:
    """`encode_png` as the text that goes into JSON."""
    return base64.b64encode(encode_png(image)).decode("ascii")


def count_pixels(texts: Sequence[str], *, field: str = "images") -> int:
    """Pixels of base64 PNGs together, from their headers: nothing is unpacked.

    Raises:
        ValueError: see `decode_images`.
    """
    # Base64 of the header: 3 bytes in 4 characters.
    starts = (text[: HEADER_BYTES * 4 // 3] for text in texts)
    return sum(read_header(_from_base64(s, f"{field}[{i}]"), f"{field}[{i}]").pixels for i, s in enumerate(starts))


def decode_images(texts: Sequence[str], *, max_pixels: int, field: str = "images") -> list[Tensor]:
    """Decode base64 PNGs to uint8 tensors, shape (3, H, W) each.

    Args:
        texts: one PNG each.
        max_pixels: of all of them together. Checked on the headers, before any pixel is unpacked: a PNG of a few
            kilobytes can hold gigabytes.
        field: their name, for messages.

    Raises:
        ValueError: not base64, no 8-bit RGB PNG, or too many pixels; says which one.
    """
    check_pixels(count_pixels(texts, field=field), max_pixels, field)
    return [read_pixels(_from_base64(text, f"{field}[{i}]"), f"{field}[{i}]") for i, text in enumerate(texts)]


def check_pixels(pixels: int, most: int, field: str = "images") -> None:
    """Refuse more pixels than a request may hold.

    Raises:
        ValueError: naming both numbers.
    """
    if pixels > most:
        raise ValueError(
            f"{field} hold more than {most} pixels in all, which is the most a request may ({pixels} received): send "
            "fewer at a time, or raise max_megapixels of the service."
        )


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        hint = " Leave out what stands before the comma of a data URL." if text.startswith("data:") else ""
        raise ValueError(f"{where} is not base64.{hint}") from None


def explain_validation(error: ValidationError) -> str:
    """The first fault of a message in one line: where, what is wrong, what was received."""
    faults = error.errors(include_url=False, include_context=False)
    where = ".".join(str(part) for part in faults[0]["loc"]) or "the message"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where[:QUOTED]}: {faults[0]['msg'].removeprefix('Value error, ')[:QUOTED]}{_shown(faults[0])}{more}."


def _shown(fault: Mapping[str, Any]) -> str:
    value = fault.get("input")
    return f", received {value!r:.60}" if isinstance(value, str | int | float | bool | None) else ""
