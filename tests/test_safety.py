"""Nothing that is read can run code: no eval, no pickles, no code of models, and weights from safetensors only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lit_distill
import lit_distill.callbacks
from lit_distill.models import ModelSpec

PACKAGE = Path(lit_distill.__file__).parent
ROOT = PACKAGE.parent
FOLDERS = (PACKAGE, Path(lit_distill.callbacks.__file__).parent, ROOT / "tools")
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
"""That run what they are given. `compile` without a dot: a model's own `.compile()` is another."""
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def calls(tree: ast.AST):
    """Every call, by the name that stands in the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def faults(source: str) -> list[str]:
    """What in ``source`` could run code that is only data."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found += [alias.name for alias in node.names if alias.name != "UnpicklingError"]  # to be caught
    for name, call in calls(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in CALLS:
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if given.get("trust_remote_code") == "True" or given.get("use_safetensors") == "False":
            found.append(f"{name} with {given}")
        if given.get("allow_pickle") == "True" or given.get("shell") == "True":
            found.append(f"{name} with {given}")
        if name.endswith("np.load") and "allow_pickle" in given:
            found.append(name)
    return found


def test_no_source_runs_what_is_only_data() -> None:
    assert len(SOURCES) > 100
    found = {str(path): faults(path.read_text()) for path in SOURCES}
    assert not {path: calls for path, calls in found.items() if calls}


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, use_safetensors=False)",
        "subprocess.run(x, shell=True)",
        "yaml.load(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert faults(source)


def test_code_of_models_is_off_unless_asked_for() -> None:
    assert ModelSpec("x").trust_remote_code is False


def test_weights_are_asked_for_as_safetensors_wherever_they_are_loaded() -> None:
    places = [
        (path, call)
        for path in SOURCES
        if path.is_relative_to(PACKAGE)
        for name, call in calls(ast.parse(path.read_text()))
        if name == "AutoModelForCausalLM.from_pretrained"
    ]
    assert [path.name for path, _ in places] == ["readback.py", "spec.py"]
    (back, _) = (ast.unparse(call) for _, call in places)
    assert "use_safetensors=True" in back
    assert 'arguments["use_safetensors"] = True' in (PACKAGE / "models" / "spec.py").read_text()
