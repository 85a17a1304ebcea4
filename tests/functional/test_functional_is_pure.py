"""The package's lowest layer: nothing below it but torch and Triton, and nothing of it hidden from `lit_distill.functional`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import lit_distill.functional

FILES = sorted(Path(lit_distill.functional.__file__).parent.glob("*.py"))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module


def test_functional_imports_torch_and_itself_only():
    assert len(FILES) > 5
    for path in FILES:
        for module in imported_modules(path):
            top = module.split(".")[0]
            allowed = (
                top == "torch"
                or (top == "triton" and path.name == "fused.py")
                or top in sys.stdlib_module_names
                or module.startswith("lit_distill.functional")
            )
            assert allowed, f"{path.name} imports {module}"


def test_every_public_function_is_exported():
    for path in FILES:
        if path.stem in {
            "__init__",
            "masking",
            "distributions",
            "closed_form",
            "fused",
            "host",
        }:  # what the others are built from
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.name in lit_distill.functional.__all__
    assert all(hasattr(lit_distill.functional, name) for name in lit_distill.functional.__all__)
