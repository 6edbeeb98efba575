"""What tests expect not to happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def does_not_raise(kind: type[Exception]) -> Iterator[None]:
    """Fail with the message of an exception of this kind that the block raises: what it tries must be accepted."""
    try:
        yield
    except kind as error:
        pytest.fail(f"refused: {error}")
