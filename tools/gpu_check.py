"""Check that this project works on the CUDA device of this machine, and measure its speed: one table with pass and fail.

python tools/gpu_check.py
python tools/gpu_check.py --device cpu
python tools/gpu_check.py --only head speed --json table.json

Runs from a checkout, installed or not, without network, in under five minutes on a GPU. The reference is the CPU. The exit
status is 1 if a row fails. With ``--device cpu`` the same checks run at smaller sizes, without those that need CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # before the libraries that use these variables are imported
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from gpu_checks.project import make_importable

make_importable()

import torch  # noqa: E402
from gpu_checks import graphs, head, quickstarts, rollouts, speed, training  # noqa: E402
from gpu_checks.machine import Machine, describe, quiet  # noqa: E402
from gpu_checks.table import Table  # noqa: E402

SUBJECTS = {
    "head": head.checks,
    "rollouts": rollouts.checks,
    "training": training.checks,
    "quickstarts": quickstarts.checks,
    "speed": speed.checks,
    "graphs": graphs.checks,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the checks and print the table; returns 1 if a row fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="groups of checks to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device. To run the checks on the CPU, set --device cpu.")
    since = time.perf_counter()
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 products are compared with those of the CPU
    about = describe(given.device)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    table = Table()
    with tempfile.TemporaryDirectory() as folder, quiet():
        machine = Machine(
            torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu"), Path(folder)
        )
        for subject in given.only:
            for name, check in SUBJECTS[subject](machine):
                table.run(name, check)
                machine.clear()
    seconds = time.perf_counter() - since
    print(table.summary(seconds), flush=True)
    if given.json:
        given.json.write_text(json.dumps({**about, "seconds": round(seconds, 1), "rows": table.records()}, indent=1))
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main())
