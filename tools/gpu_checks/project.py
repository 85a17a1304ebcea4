"""Makes this checkout importable, whether it is installed or not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
CONFIGS = CHECKOUT / "configs"
CALLBACKS = "lit_distill.callbacks"


def make_importable() -> None:
    """Make ``import lit_distill.callbacks`` work in a checkout that is not installed, where its files are in ``callbacks/``."""
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    import lit_distill

    if importlib.util.find_spec(CALLBACKS) is not None:
        return
    folder = CHECKOUT / "callbacks"
    spec = importlib.util.spec_from_file_location(
        CALLBACKS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[CALLBACKS] = module
    lit_distill.callbacks = module
    spec.loader.exec_module(module)
