"""What is installed is the package, all of it and nothing else."""

from __future__ import annotations

import runpy
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from command_line import run

import lit_distill

ROOT = Path(__file__).parents[1]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "lit_distill", "callbacks", "configs", "tests", "tools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> ZipFile:
    """Built beside the repository, so that no ``build`` folder is left in it; isolated only where setuptools is missing."""
    beside, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        if (ROOT / name).exists():
            (beside / name).symlink_to(ROOT / name)
    setuptools = subprocess.run([sys.executable, "-c", "import setuptools"], capture_output=True, check=False)
    isolation = [] if setuptools.returncode else ["--no-isolation"]
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", out, beside]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = out.glob("*.whl")
    return ZipFile(built)


def metadata(wheel: ZipFile, name: str) -> str:
    (found,) = (file for file in wheel.namelist() if file.endswith(f".dist-info/{name}"))
    return wheel.read(found).decode()


@pytest.mark.slow
def test_nothing_generic_lands_in_site_packages(wheel) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"lit_distill", f"lit_distill-{lit_distill.__version__}.dist-info"}


@pytest.mark.slow
def test_every_source_file_is_in_the_wheel_and_callbacks_are_a_subpackage(wheel) -> None:
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "lit_distill").rglob("*.py")}
    ours |= {f"lit_distill/{path.relative_to(ROOT)}" for path in (ROOT / "callbacks").rglob("*.py")}
    assert ours == {name for name in wheel.namelist() if name.endswith(".py")}
    assert "lit_distill/callbacks/__init__.py" in ours


@pytest.mark.slow
def test_types_and_assets_are_in_the_wheel(wheel) -> None:
    assets = {str(p.relative_to(ROOT)) for p in (ROOT / "lit_distill" / "assets").rglob("*") if p.is_file()}
    assert assets
    page = {f"lit_distill/report/{name}" for name in ("page.html.jinja", "style.css")}
    assert {*assets, *page, "lit_distill/py.typed"} <= set(wheel.namelist())


@pytest.mark.slow
def test_licence_entry_point_and_version_are_told(wheel) -> None:
    about = Parser().parsestr(metadata(wheel, "METADATA"))
    assert about["Version"] == lit_distill.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert "lit-distill = lit_distill.cli.app:main" in metadata(wheel, "entry_points.txt")


@pytest.mark.slow
def test_python_m_is_the_console_script(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["lit_distill", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("lit_distill", run_name="__main__")
    printed = capsys.readouterr().out
    for subcommand in ("fit", "validate", "test", "predict"):
        assert subcommand in printed


def test_the_version_is_printed_on_request(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out == f"lit-distill {lit_distill.__version__}\n"
