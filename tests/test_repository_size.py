"""What a clone downloads stays small: all tracked files together."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST = 40 * 10**6


def test_tracked_files_stay_below_40_megabytes() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name for name in listed.decode().split("\0") if name]
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in files if path.is_file()}
    assert (ROOT / "train.py").relative_to(ROOT) in sizes
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert sum(sizes.values()) < LARGEST, f"{sum(sizes.values()):,} bytes; the largest: {largest}"
