"""What is imported is listed, every range has both ends, and the lock file pins what the ranges allow."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
#: modules whose package has another name
NAMES = {"pillow": "PIL", "pyyaml": "yaml", "dicebear-core": "dicebear", "pytest-xdist": "xdist"}
#: plug-ins that a user installs for one reward; the module that imports them says so when they are missing
OPTIONAL = {"insightface", "rapidocr_onnxruntime"}
#: brought along by a listed package whose own interface they are
INSIDE = {"packaging": "pytest"}


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line]
    assert len({canonicalize_name(r.name) for r in found}) == len(found), f"{name} lists a package twice"
    return {canonicalize_name(r.name): r for r in found}


def imports(path: Path, known: set[str]) -> dict[str, int]:
    """Packages that a file imports beside known ones, and the line."""
    text = path.read_text(encoding="utf-8")
    # Parsing every file takes seconds; a line of prose may look like an import.
    if set(re.findall(r"^\s*(?:import|from(?=.*import))\s+(\w+)", text, re.MULTILINE)) <= known:
        return {}
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        else:
            continue
        found |= {name: node.lineno for name in (m.partition(".")[0] for m in modules) if name not in known}
    return found


def missing(root: Path, listed: set[str]) -> list[str]:
    own = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name[0] != ".")}
    modules = {NAMES.get(name, name.replace("-", "_")) for name in listed}
    known = modules | own | sys.stdlib_module_names | OPTIONAL | INSIDE.keys()
    files = list(root.glob("*.py"))
    files += [path for name in sorted(own) for path in sorted((root / name).rglob("*.py"))]
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in files
        for name, line in imports(path, known).items()
    ]


def test_what_is_imported_is_listed() -> None:
    told = missing(ROOT, set(requirements("requirements.txt")))
    assert not told, "\n".join([*told, "List the packages in requirements.txt, then: make lock"])


def test_an_import_that_nobody_listed_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text(
        '"""From here\nfrom nowhere it comes."""\nimport os\n\ndef f():\n    import attrs.x\n'
    )
    assert missing(tmp_path, {"numpy"}) == ["room/a.py:6 imports attrs"]
    assert missing(tmp_path, {"attrs"}) == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-gpu.txt"])
def test_every_range_has_both_ends(name: str) -> None:
    for requirement in requirements(name).values():
        kinds = {re.sub(r"[^<>=!]", "", str(part))[:2] for part in requirement.specifier}
        assert kinds - {"!="} in ({">=", "<"}, {"=="}), f"{name}: {requirement}"


def test_the_gpu_list_is_part_of_the_whole() -> None:
    whole = requirements("requirements.txt")
    for name, requirement in requirements("requirements-gpu.txt").items():
        assert requirement.specifier == whole[name].specifier, name


def test_what_is_installed_lies_in_the_ranges() -> None:
    for requirement in requirements("requirements.txt").values():
        assert requirement.specifier.contains(version(requirement.name)), requirement


def test_the_lock_pins_what_is_listed_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    pins: defaultdict[str, list[str]] = defaultdict(list)
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        pin, *hashes = re.split(r"\s+--hash=", line)
        requirement = Requirement(pin)
        assert hashes, f"{pin} has no hash"
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", found) for found in hashes)
        pins[canonicalize_name(requirement.name)] += [str(part).removeprefix("==") for part in requirement.specifier]
    listed = requirements("requirements.txt")
    for name, requirement in listed.items():
        assert pins[name], f"requirements.lock has no {name}: make lock"
        assert all(requirement.specifier.contains(pin) for pin in pins[name]), f"{requirement}: make lock"
    assert len(pins) > len(listed)
