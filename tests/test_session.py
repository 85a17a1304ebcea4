"""What other packages deprecate is listed and fails nothing; what our own files do is an error."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import session

OURS = ("lit_distill.models.spec", "lit_distill.callbacks.report", "test_guards", "bad_input.conftest", "kill_study")
OTHERS = ("transformers.models.llama", "torch", "lightning.pytorch.cli", "memory_profiler")


def warn(module: str, message: str = "is deprecated", line: int = 3) -> None:
    warnings.warn_explicit(message, DeprecationWarning, f"/venv/site-packages/{module}.py", line, module=module)


@pytest.mark.parametrize("module", OURS)
def test_a_deprecated_call_in_our_own_files_is_an_error(module: str) -> None:
    with pytest.raises(DeprecationWarning, match="is deprecated"):
        warn(module)


@pytest.mark.parametrize("module", OTHERS)
def test_a_deprecated_call_in_another_package_is_none(module: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warn(module)
    assert [warning.category for warning in caught] == [DeprecationWarning]


def test_each_warning_is_listed_once_with_how_often_it_came(monkeypatch) -> None:
    monkeypatch.setattr(session, "_WARNED", session.Counter())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for line in (3, 3, 8):
            warn("torch", "old\nand more", line)
    for warning in caught:
        session.pytest_warning_recorded(warning)
    printed: list[str] = []
    session.pytest_terminal_summary(SimpleNamespace(section=printed.append, write_line=printed.append))
    assert printed == [
        "2 warnings of other packages",
        "    2 x torch.py:3: DeprecationWarning: old",
        "    1 x torch.py:8: DeprecationWarning: old",
    ]


@pytest.mark.parametrize(
    ("asked", "debugger", "workers"),
    [(["."], False, 3), (["test_session.py"], False, 0), (["test_session.py::test_x"], False, 0), (["."], True, 0)],
)
def test_whole_folders_run_on_all_cores_and_single_files_in_one_process(
    monkeypatch, pytestconfig, asked: list[str], debugger: bool, workers: int
) -> None:
    monkeypatch.chdir(pytestconfig.rootpath / "tests")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    config = SimpleNamespace(args=asked, getoption={"usepdb": debugger}.get)
    assert session.pytest_xdist_auto_num_workers(config) == workers
