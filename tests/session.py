"""How the tests run: on how many processes, and what other packages warned of, once, at the end."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_WORKERS = 8
"""Each imports torch and transformers: about 600 MB."""
LONGEST = ("soft_stops", "parallel", "resume_on_two_ranks", "guards", "two_ranks", "gpu_check", "every_trainer_option")
"""Files of the slow tier that are begun first, so that no worker begins one when the others are done."""
_WARNED: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    """Warnings of the tools and of what tests share are errors, as those of the package and of the tests are."""
    if config.option.markexpr == "slow":
        config.option.loadscopereorder = False  # xdist begins with the files of many tests, which here are short
    for folder in (ROOT / "tests", ROOT / "tools"):
        for path in sorted(folder.rglob("*.py")):
            names = {".".join(path.relative_to(folder).with_suffix("").parts)}
            if folder.name == "tests":
                names.add(path.stem)  # pytest imports a file by its own folder
            for name in sorted(names):
                config.addinivalue_line("filterwarnings", rf"error:::{re.escape(name)}(\.|$)")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker a core; none for a debugger, or where single files are asked for: starting workers would take longer."""
    folders = [argument for argument in config.args if Path(argument.split("::")[0]).is_dir()]
    if config.getoption("usepdb") or not folders:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files of the slow tier first."""

    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    if config.option.markexpr == "slow":
        items.sort(key=place)


def described(warning: warnings.WarningMessage) -> str:
    """A warning in one line: where, what kind, and the first line of what is said."""
    path = Path(warning.filename).as_posix().rpartition("/site-packages/")[2]
    said = re.sub(r"'/[^']*'", "'…'", next(iter(str(warning.message).strip().splitlines()), ""))  # folders of tests
    return f"{path}:{warning.lineno}: {warning.category.__name__}: {said}"


def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    """Count it. Warnings of our own files are errors and never come here, see ``filterwarnings`` in pyproject.toml."""
    _WARNED[described(warning_message)] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each distinct warning, the most frequent first."""
    if _WARNED:
        terminalreporter.section(f"{len(_WARNED)} warnings of other packages")
        for line, times in _WARNED.most_common():
            terminalreporter.write_line(f"{times:5d} x {line}")
