"""Every path and module that the documentation names exists."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted(f"demo/{path.name}" for path in (ROOT / "demo").glob("*.md"))
#: folders of the project that a path in backticks starts with; anything else is not a path of it
TOPS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"runs"}
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}
#: fenced blocks hold commands and settings, whose files a user makes
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def spans(text: str) -> Iterator[str]:
    """What stands in backticks, by word."""
    for span in re.findall(r"`+([^`\n]+)`+", FENCE.sub("", text)):
        yield from span.split()


def paths(document: str, text: str) -> Iterator[tuple[str, Path]]:
    """Local links and paths in backticks, with where they lead."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        target = target.split("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            yield target, (ROOT / document).parent / target
    for word in spans(text):
        name = word.strip(".,;:()")
        option, _, value = name.rpartition("=")
        name = value if option.startswith("--") else name
        path = re.fullmatch(r"[\w.\-]+(/[\w.\-*]+)*/?", name) and "/" in name
        if (path and name.split("/")[0] in TOPS) or re.fullmatch(r"[\w\-]+(/[\w\-]+)*\.(py|md|toml)", name):
            yield name, ROOT / name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    missing = [
        name
        for name, path in paths(document, text)
        if not (any(ROOT.glob(name)) if "*" in name else path.exists())
        and not any(path.name == other.name for other in ROOT.glob(f"*/**/{path.name}") if "/" not in name)
    ]
    assert not missing, f"{document} names what is not there: {', '.join(dict.fromkeys(missing))}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_and_names_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    wrong = []
    for word in dict.fromkeys(spans(text)):
        name = word.strip(".,;:(){}")
        if re.fullmatch(r"[a-z_]\w*(\.[A-Za-z_]\w*)+", name) and name.split(".")[0] in PACKAGES and not _exists(name):
            wrong.append(name)
    assert not wrong, f"{document} names what is not there: {', '.join(wrong)}"


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file() or path.is_dir():
            break
    else:
        return False
    if length == len(parts):
        return True
    found = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_a_missing_path_is_found() -> None:
    text = "`flow_rl/nowhere.py` and [a link](docs/nowhere.md), `--config=configs/nowhere.yaml`"
    assert [path.exists() for _, path in paths("README.md", text)] == [False] * 3
    assert not _exists("flow_rl.flow.nowhere")
    assert _exists("flow_rl.flow.windows.WindowSettings")
