"""Measure the project beside other ways to do the same, in one process and alternating: one table with ratios and goals.

python tools/benchmark.py                                   # all rows: about half an hour on two cores
python tools/benchmark.py --only P1 P6 --repeats 5 --json results.json
python tools/benchmark.py --quick --device cpu              # tiny sizes, to try whether everything runs; no goals are judged
python tools/benchmark.py --table results.json              # the Markdown table of a stored run

Runs from a checkout, installed or not, without network. TRL is an extra of its own: without it, its rows are skipped. The exit
status is 1 if a row raises an error; a goal that is missed is a result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before the libraries that use these variables are imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from gpu_checks.project import make_importable

make_importable()

import torch  # noqa: E402
from benchmarks import decoding, head, phase, rollouts, scaling, steps, waits  # noqa: E402
from benchmarks.measure import Bench  # noqa: E402
from benchmarks.results import Result, Results, markdown  # noqa: E402
from gpu_checks.machine import Machine, describe, quiet  # noqa: E402

from lit_distill.models.precision import keep_freed_memory  # noqa: E402


class Row(NamedTuple):
    """One measurement of an id; an id may have several."""

    name: str
    measure: Callable[[Bench], Iterable[Result]]


ROWS = (
    Row("P1", head.head),
    Row("P1", head.wide_teacher),
    Row("P1", head.other_ways),
    Row("P1g", head.cuda_head),
    Row("P2", rollouts.mixed),
    Row("P2g", rollouts.cuda_rollouts),
    Row("P3", steps.on_policy),
    Row("P4", steps.offline),
    Row("P5", phase.minillm),
    Row("P6", decoding.decoding),
    Row("P7", waits.waits),
    Row("P8", scaling.scaling),
)
NAMES = tuple(dict.fromkeys(row.name for row in ROWS))


def versions_of_peers() -> str:
    """Versions of what the rows compare with."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("trl", "accelerate"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print the table; returns 1 if a row raised, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="ROW", help=" ".join(NAMES))
    parser.add_argument("--repeats", type=int, default=3, help="alternating rounds of each measurement")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round; no goals are judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write machine, versions and table to this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the plots of P8 into this folder")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table that --json wrote")
    given = parser.parse_args(arguments)
    if given.table:
        print(markdown(json.loads(given.table.read_text(encoding="utf-8"))))
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device. To measure the CPU, set --device cpu.")
    if given.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {given.repeats}.")
    since = time.perf_counter()
    keep_freed_memory(given.device)  # for ours and the peers, as in a run
    torch.set_float32_matmul_precision("highest")  # no TF32: ours and peers compute the same
    about = describe(given.device)
    about["versions"] += f", {versions_of_peers()}"
    about["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
    print("\n".join(f"{name}: {value}" for name, value in about.items()), "", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder, quiet():
        device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
        machine = Machine(device, Path(folder))
        bench = Bench(machine, 1 if given.quick else given.repeats, given.quick, given.plots)
        results = Results(judged=not given.quick)
        for row in ROWS:
            if row.name in given.only:
                results.run(row.name, partial(row.measure, bench))
                machine.clear()
    seconds = time.perf_counter() - since
    print("", results.summary(seconds), sep="\n", flush=True)
    if given.json:
        record = {**about, "repeats": bench.repeats, "quick": given.quick, "seconds": round(seconds, 1)}
        given.json.write_text(
            json.dumps({**record, "rows": results.records()}, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
