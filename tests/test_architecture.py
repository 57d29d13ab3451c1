"""The import graph is the one drawn in docs/architecture.md: named floors, imports only downwards, no circle.

Imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spt_fast"
DRAWING = ROOT / "docs" / "architecture.md"

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it: "train.loop", and "kernels" for kernels/__init__.py."""
    found = {}
    for folder in (PACKAGE, *(room.resolve() for room in PACKAGE.iterdir() if room.is_dir())):
        room = "" if folder == PACKAGE else f"{folder.name}."
        for file in sorted(folder.rglob("*.py")):
            if folder == PACKAGE and file.parent != PACKAGE:
                continue
            name = room + ".".join(file.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix("__init__").removesuffix(".")] = file
    return found


def imports(file: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("spt_fast.") in known else node.module for name in inner]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        found |= {name.removeprefix("spt_fast.") for name in names if name.startswith("spt_fast.")}
    return found


ALIASES = {"train.score": "evaluation.score"}
"""Earlier names of modules, which users' code may import, and the present ones. Nothing in spt_fast imports them."""


def test_an_earlier_name_is_the_same_module(graph: Graph) -> None:
    for before, now in ALIASES.items():
        assert importlib.import_module(f"spt_fast.{before}") is importlib.import_module(f"spt_fast.{now}")
        assert not [name for name, found in graph.items() if before in found]


@pytest.fixture(scope="module")
def graph() -> Graph:
    files = modules()
    return {name: imports(file, set(files)) - {name} for name, file in files.items() if name and name not in ALIASES}


def room_of(module: str) -> str:
    """Its folder, or itself where it lies in none; programs (`python -m …`) stand above everything."""
    return "cli" if module.endswith("__main__") else module.split(".")[0]


EVERYWHERE = {"errors", "files", "locks", "outputs", "quantities"}
"""Rooms that all others may use; their edges are not drawn."""


def drawn_floors() -> list[set[str]]:
    """Top floor first."""
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", DRAWING.read_text(), re.MULTILINE)
    return [set(re.findall(r"`(\w+)`", row)) for row in rows]


def drawn_edges() -> set[tuple[str, str]]:
    return set(re.findall(r"^ *(\w+) --> (\w+)$", DRAWING.read_text(), re.MULTILINE))


def test_no_circle_between_modules(graph: Graph) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' → '.join(error.args[1])}")


def test_every_room_has_one_floor(graph: Graph) -> None:
    floors = drawn_floors()
    assert sorted(room for floor in floors for room in floor) == sorted({room_of(module) for module in graph})


def test_imports_go_down(graph: Graph) -> None:
    level = {room: i for i, floor in enumerate(drawn_floors()) for room in floor}
    upwards = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if room_of(module) != room_of(other) and level[room_of(module)] >= level[room_of(other)]
    ]
    assert not upwards


def test_the_drawing_is_the_graph(graph: Graph) -> None:
    edges = {(room_of(module), room_of(other)) for module, others in graph.items() for other in others}
    assert drawn_edges() == {(a, b) for a, b in edges if a != b and b not in EVERYWHERE}


def test_tests_need_no_benchmark() -> None:
    """Benchmarks may use tests; only what tests the benchmarks themselves uses them."""
    files = [file for file in (ROOT / "tests").rglob("*.py") if file.parent.name != "benchmarks"]
    uses = re.compile(r"^\s*(from|import) benchmarks\b|\"-m\", \"benchmarks", re.MULTILINE)
    assert [str(file) for file in files if uses.search(file.read_text())] == []


def test_make_test_fast_covers_every_room() -> None:
    said = subprocess.run(["make", "-n", "test-fast", "VENV=/absent"], cwd=ROOT, capture_output=True, text=True).stdout
    files = [ROOT / file for file in re.findall(r"tests/\S+\.py", said)]
    assert files
    assert [file for file in files if not file.exists() or "\npytestmark = pytest.mark.long" in file.read_text()] == []
    rooms = {folder.name for folder in (ROOT / "tests").iterdir() if list(folder.glob("test_*.py"))}
    assert rooms - {file.parent.name for file in files} == {"benchmarks", "report"}, (
        "the library's test writes a report"
    )


def test_what_is_read_in_one_sitting_stays_short() -> None:
    files = [PACKAGE / "train" / "loop.py", *(PACKAGE / "cli").glob("*.py")]
    lines = {file.name: len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lines.items() if length > 400} == {}
