"""White-box distillation of language models on PyTorch Lightning. A method is a YAML file."""

import os
import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# On a processor, idle threads that spin while they wait slow each other down tenfold as soon as something else runs there.
# OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

MOVED = {"rollouts": "sources", "schedulers": "optim", "parallel": "distributed"}
"""Old name of a module that configs and user code import from, and its new name; the old ones work for one release."""


class _MovedModules(MetaPathFinder, Loader):
    """Lets an import of an old name give the new module's names, with a warning."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{__name__}.{MOVED[spec.name.rpartition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}.", FutureWarning, stacklevel=2)
        module, moved = ModuleType(spec.name), import_module(new)
        module.__dict__.update({name: value for name, value in vars(moved).items() if not name.startswith("__")})
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, _MovedModules())  # before an empty folder that an update in place leaves behind
