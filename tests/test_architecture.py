"""Imports point one way and never in a circle, so that every room can be read and tested without those above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import lit_distill
import lit_distill.callbacks

PACKAGE, CALLBACKS = Path(lit_distill.__file__).parent, Path(lit_distill.callbacks.__file__).parent
ROOMS = [
    *("functional", "types", "files", "objectives", "data", "distributed", "optim", "models", "teachers", "losses"),
    *(
        "generation",
        "sources",
        "evaluation",
        "validation",
        "resume",
        "report",
        "module",
        "callbacks",
        "cli",
        "__main__",
    ),
]
"""Each imports from those before it; type hints count. At the root of the package there are no other files."""


def modules() -> dict[str, Path]:
    """Every file by the name it is imported by, without ``lit_distill.``."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return found | {f"callbacks.{path.stem}": path for path in CALLBACKS.glob("*.py")}


FILES = modules()


def imported(path: Path) -> Iterator[str]:
    """The files that one imports, anywhere in it; a name of a package counts as the file it comes from."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            names = [f"{node.module}.{name}" for name in names]
        for name in names:
            if name.startswith("lit_distill."):
                yield origin(name.removeprefix("lit_distill."))


def origin(name: str) -> str:
    if name in FILES:
        return name
    if f"{name}.__init__" in FILES:
        return f"{name}.__init__"
    owner, _, thing = name.rpartition(".")
    if f"{owner}.__init__" in FILES:
        for node in ast.parse(FILES[f"{owner}.__init__"].read_text()).body:
            if isinstance(node, ast.ImportFrom) and thing in [alias.name for alias in node.names]:
                return origin(f"{node.module}.{thing}".removeprefix("lit_distill."))
        return f"{owner}.__init__"
    return owner or "__init__"


IMPORTS = {name: set(imported(path)) for name, path in FILES.items()}


def test_every_room_imports_from_those_before_it_alone() -> None:
    place = {room: index for index, room in enumerate(ROOMS)}
    assert {name.split(".")[0] for name in FILES} == {*ROOMS, "__init__"}
    upward = {
        f"{name} -> {other}"
        for name, others in IMPORTS.items()
        for other in others - {"__init__"}
        if place[other.split(".")[0]] > place[name.split(".")[0]]
    }
    assert not upward


def test_no_file_imports_itself_by_way_of_others() -> None:
    own = {name: {other for other in others if not other.endswith("__init__")} for name, others in IMPORTS.items()}
    assert len(list(TopologicalSorter(own).static_order())) > 100
