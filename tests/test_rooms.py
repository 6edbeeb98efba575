"""The wall around the library, and rooms that import downward only: read from the sources, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: rooms of the library, the lowest first; each imports only those before it
ROOMS = (
    "flow",
    "models",
    "distributed",
    "rewards",
    "evaluation",
    "rl",
    "distillation",
    "monitoring",
    "curation",
    "planning",
)
#: files of the library that lie below every room
LEAVES = (
    "__init__",
    "batches",
    "errors",
    "file_kinds",
    "files",
    "lazy_names",
    "messages",
    "names",
    "pictures",
    "stop_signal",
    "strict_json",
    "strict_yaml",
    "suggestions",
)
APPLICATION = ("benchmarks", "callbacks", "cli", "datamodules", "demo", "lightning_modules", "strategies")
#: what the library must not import, not even inside a function
OUTSIDE = ("lightning", "lightning_fabric", "pytorch_lightning", "jsonargparse", "tests", "train", *APPLICATION)
#: modules in the root belong to the application, too
OUTSIDE += tuple(sorted(path.stem for path in ROOT.glob("*.py")))


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import statement of a project's file.

    Attributes:
        file: relative to the root.
        line: of the statement.
        module: what is imported: a submodule where the name is one, else the module that has the name.
        for_types: whether it is for type checkers alone, and never runs.
    """

    file: str
    line: int
    module: str
    for_types: bool

    @property
    def importer(self) -> str:
        """Dotted name of the file."""
        return module_of(self.file)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def sources(root: Path) -> list[str]:
    folders = [root / name for name in ("flow_rl", *APPLICATION)]
    return sorted(str(path.relative_to(root)) for folder in folders for path in folder.rglob("*.py"))


def imports(root: Path, files: Sequence[str]) -> list[Import]:
    modules = {module_of(file) for file in files}
    return [found for file in files for found in _of_file(root, file, modules)]


def _of_file(root: Path, file: str, modules: set[str]) -> Iterator[Import]:
    package = file.removesuffix(".py").split("/")[:-1]
    for node, for_types in _nodes(ast.parse((root / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = ".".join([*package[: len(package) - node.level + 1], node.module or ""]).strip(".")
            base = base if node.level else str(node.module)
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names]
        for name in dict.fromkeys(names):
            yield Import(file=file, line=node.lineno, module=name, for_types=for_types)


def _nodes(tree: ast.AST, for_types: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, for_types
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for part in node.body:
                yield from _nodes(ast.Module(body=[part], type_ignores=[]), True)
            for part in node.orelse:
                yield from _nodes(ast.Module(body=[part], type_ignores=[]), for_types)
        else:
            yield from _nodes(node, for_types)


def breaches(found: Sequence[Import]) -> list[str]:
    """Imports that leave the library, or lead upward in it."""
    wrong = []
    for entry in found:
        parts, target = entry.importer.split("."), entry.module.split(".")
        if parts[0] != "flow_rl":
            continue
        if target[0] in OUTSIDE:
            wrong.append(f"{entry}: the library may not import {target[0]}")
        elif target[0] == "flow_rl":
            here, there = (_height(name) for name in (parts, target))
            if there > here or (there == here == -1 and target[1:2] == []):
                wrong.append(f"{entry}: {'.'.join(parts[:2])} lies below {'.'.join(target[:2])}")
    return wrong


def _height(parts: Sequence[str]) -> int:
    """Place in the order of rooms; -1 for what lies below all of them."""
    name = parts[1] if len(parts) > 1 else "__init__"
    return -1 if name in LEAVES else ROOMS.index(name)


def circles(edges: Mapping[str, set[str]]) -> list[frozenset[str]]:
    """Strongly connected components of two or more nodes (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            component = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(frozenset(component))

    for node in sorted(edges):
        if node not in number:
            visit(node)
    return found


def file_edges(found: Sequence[Import], modules: set[str]) -> dict[str, set[str]]:
    """Which file imports which when it runs; imports for type checkers alone never run, and do not count."""
    edges: dict[str, set[str]] = {}
    for entry in found:
        if entry.module in modules and entry.module != entry.importer and not entry.for_types:
            edges.setdefault(entry.importer, set()).add(entry.module)
    return edges


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "flow_rl" else 1])


def lines_of(circle: frozenset[str], found: Sequence[Import], key=lambda name: name) -> str:
    inside = [f for f in found if key(f.importer) in circle and key(f.module) in circle]
    return "\n  ".join(str(f) for f in inside if key(f.importer) != key(f.module))


@pytest.fixture(scope="module")
def project() -> tuple[list[Import], set[str]]:
    files = sources(ROOT)
    return imports(ROOT, files), {module_of(file) for file in files}


def test_every_room_has_a_height() -> None:
    library = ROOT / "flow_rl"
    rooms = {path.name for path in library.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == set(ROOMS)
    assert {path.stem for path in library.glob("*.py")} == set(LEAVES)


def test_the_library_imports_downward_only_and_nothing_of_the_application(project) -> None:
    assert not (wrong := breaches(project[0])), "\n".join(wrong)


def test_no_circle_of_files(project) -> None:
    found, modules = project
    told = [f"circle of {', '.join(sorted(c))}:\n  {lines_of(c, found)}" for c in circles(file_edges(found, modules))]
    assert not told, "\n".join(told)


def test_no_circle_of_rooms(project) -> None:
    found, modules = project
    edges: dict[str, set[str]] = {}
    for entry in found:  # imports for type checkers count here: a room is known by what it names
        if entry.module in modules and room_of(entry.module) != room_of(entry.importer):
            edges.setdefault(room_of(entry.importer), set()).add(room_of(entry.module))
    told = [f"circle of {', '.join(sorted(c))}:\n  {lines_of(c, found, room_of)}" for c in circles(edges)]
    assert not told, "\n".join(told)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("flow_rl/rl/new.py", "def f():\n    import lightning.pytorch\n", "flow_rl/rl/new.py:2 imports lightning"),
        ("flow_rl/rl/new.py", "from jsonargparse import Namespace\n", "may not import jsonargparse"),
        ("flow_rl/rewards/new.py", "from demo.world import world\n", "may not import demo"),
        ("flow_rl/flow/new.py", "from flow_rl.models import images\n", "flow_rl.flow lies below flow_rl.models"),
        ("flow_rl/batches.py", "import flow_rl.flow.noise\n", "flow_rl.batches lies below flow_rl.flow"),
        ("flow_rl/rl/new.py", "if TYPE_CHECKING:\n    from callbacks import WeightEMA\n", "may not import callbacks"),
        ("flow_rl/rl/new.py", "from ..planning import plan\n", "flow_rl.rl lies below flow_rl.planning"),
    ],
)
def test_a_breach_is_told_by_its_line(tmp_path: Path, file: str, text: str, told: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    (message,) = breaches(imports(tmp_path, [file]))
    assert told in message


def test_a_circle_is_found(tmp_path: Path) -> None:
    texts = {"a.py": "import demo.b\n", "b.py": "def f():\n    from demo import c\n", "c.py": "from demo.a import x\n"}
    (tmp_path / "demo").mkdir()
    for name, text in texts.items():
        (tmp_path / "demo" / name).write_text(text)
    files = sources(tmp_path)
    found = imports(tmp_path, files)
    assert circles(file_edges(found, {module_of(f) for f in files})) == [frozenset({"demo.a", "demo.b", "demo.c"})]
