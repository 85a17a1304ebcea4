"""Imports point one way, so that every layer can be read and tested without those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import lit_distill.callbacks

import lit_distill

PACKAGE = Path(lit_distill.__file__).parent
CALLBACKS = Path(lit_distill.callbacks.__file__).parent
BELOW = {
    "functional": set(),
    "types": set(),
    "schedulers": set(),
    "blame": set(),
    "replaced": set(),
    "hooks": set(),
    "atomic": set(),
    "guards": {"parallel"},
    "parallel": {"atomic"},
    "occupied": set(),
    "position": set(),
    "runs": {"occupied", "parallel"},
    "objectives": {"functional", "types"},
    "models": {"functional", "types", "objectives", "parallel", "data"},
    "data": {"functional", "types", "objectives"},
    "rollouts": {"functional", "types", "objectives", "models", "data"},
    "evaluation": {"atomic", "functional", "types", "objectives", "models", "data", "rollouts", "parallel"},
}
BELOW["checks"] = {"guards", "schedulers", "parallel", "objectives", "evaluation"}
BELOW["lengths"] = {"models"}
BELOW["trainer"] = {"models"}
BELOW["changes"] = {"models", "schedulers"}
BELOW["continuation"] = {"changes", "checks", "models", "position", "rollouts", "runs"}
BELOW["module"] = {*BELOW, "evaluation"}
BELOW["callbacks"] = {*BELOW, "module"}
BELOW["parser"] = {*BELOW, "callbacks"}
BELOW["cli"] = {*BELOW, "parser", "__init__"}
BELOW["__init__"] = set(BELOW)
BELOW["__main__"] = {"cli"}


def layer(module: str) -> str:
    """``lit_distill.models.spec`` is of the layer ``models``."""
    return [*module.split("."), "__init__"][1]


def imported(tree: ast.AST):
    """Every layer that is imported at run time, also inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (layer(alias.name) for alias in node.names if alias.name.split(".")[0] == "lit_distill")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            if node.module.split(".")[0] == "lit_distill":
                names = [f"lit_distill.{alias.name}" for alias in node.names]
                yield from map(layer, names if node.module == "lit_distill" else [node.module])
        yield from imported(node)


def sources() -> list[tuple[str, Path]]:
    inside = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]
    return inside + [("callbacks", path) for path in sorted(CALLBACKS.rglob("*.py"))]


def test_imports_point_one_way() -> None:
    assert len(sources()) > 100
    above = {path: set(imported(ast.parse(path.read_text()))) - {here} - BELOW[here] for here, path in sources()}
    assert not {str(path): sorted(layers) for path, layers in above.items() if layers}


def test_the_layers_have_no_cycle() -> None:
    done: set[str] = set()
    while ready := {name for name in BELOW if name not in done and BELOW[name] - {name} <= done | {"__init__"}}:
        done |= ready
    assert done == set(BELOW)
