"""Writes tested.txt anew: the newest release of everything that the project and its tests need, torch as it is unless told.

    python tools/constraints/renew.py                  # then run the tests, and commit what changed
    python tools/constraints/renew.py --torch 2.14.1

It installs into a new virtual environment that is thrown away, so that nothing left over by hand gets in.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTED = Path(__file__).with_name("tested.txt")
HEADER = """\
# The exact versions on which all tests last passed, for `pip install -c`; written by tools/constraints/renew.py on Python {python}.
"""


def main() -> None:
    """Install, write down, show the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torch", default=pinned(TESTED, "torch"), help="release of torch (default: the one in tested.txt)"
    )
    arguments = parser.parse_args()
    before = TESTED.read_text(encoding="utf-8") if TESTED.exists() else ""
    after = HEADER.format(python=".".join(map(str, sys.version_info[:2]))) + "".join(
        f"{line}\n" for line in newest(arguments.torch)
    )
    TESTED.write_text(after, encoding="utf-8")
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "now", lineterm="", n=0)
    print("\n".join(changes) or "tested.txt: nothing changed.")


def pinned(file: Path, package: str) -> str | None:
    """The release of a package in a file of constraints."""
    found = re.search(rf"^{package}==(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE) if file.exists() else None
    return found and found[1]


def newest(torch: str | None) -> list[str]:
    """``name==version`` of everything in a new environment with all extras; without the project and local labels (``+cpu``)."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip"]
        torch_as_given = [f"torch=={torch}"] if torch else ["torch"]
        install = [*pip, "install", "--quiet", *torch_as_given, f"{ROOT}[test,lora,gguf]"]
        subprocess.run(install, check=True)  # noqa: S603 - ours
        frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout  # noqa: S603 - ours
    lines = [re.sub(r"\+\w+$", "", line) for line in frozen.splitlines() if re.match(r"[\w.-]+==", line)]
    return sorted(line for line in lines if not line.startswith("lit-distill=="))


if __name__ == "__main__":
    main()
