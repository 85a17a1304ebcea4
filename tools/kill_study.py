"""Kills runs at random moments, lets them go on from `last`, and compares the end with that of a run that was never killed.

Run: python tools/kill_study.py --kills 50         (half a minute a kill on one core; the embedded models, no download)

Each method is trained once undisturbed. Then it is started again and again with `--ckpt_path last` and killed (SIGKILL)
after a random time, up to four times, before it may live to the end. Weights, optimiser state and logged losses must be
equal to the last bit.
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lit_distill.runs import last_checkpoint

CONFIGS = Path(__file__).parent.parent / "configs"
METHODS = ("quickstart", "minillm_quickstart", "dpkd_quickstart", "gkd_quickstart", "distillm_quickstart")
SMALL = {
    "trainer.max_steps": 24,
    "trainer.val_check_interval": 4,
    "trainer.limit_val_batches": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.log_every_n_steps": 1,
    "trainer.callbacks": "[]",
    "trainer.enable_progress_bar": "false",
    "data.num_train": 400,
    "data.num_validation": 20,
    "data.batch_size": 16,
    "generation.max_prompts": 8,
}
OF_METHOD = {"minillm_quickstart": {"model.source.mini_batch_size": 8, "trainer.val_check_interval": 1}}


def command(method: str, folder: Path, workers: int) -> list[str]:
    """`lit-distill fit` on a small share of the method's quickstart."""
    settings = {**SMALL, **OF_METHOD.get(method, {}), "data.num_workers": workers, "trainer.default_root_dir": folder}
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    start = [sys.executable, "-m", "lit_distill", "fit", "--config", str(CONFIGS / f"{method}.yaml")]
    return [*start, *options, "--ckpt_path", "last"]


def run(method: str, folder: Path, workers: int, seconds: float | None = None) -> bool:
    """Whether the process lived to the end."""
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(command(method, folder, workers), stdout=output, stderr=output)  # noqa: S603 - ours
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
    if status:
        sys.exit(f"{method} ended with status {status}; see {folder / 'output.txt'}")
    return True


def left(method: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the last checkpoint holds and what was logged of the loss."""
    last = last_checkpoint(folder, method)  # a process killed before its first checkpoint leaves an empty version
    assert last is not None
    with (last.parent.parent / "metrics.csv").open(newline="") as file:
        losses = [f"{row['step']}: {row['train/loss']}" for row in csv.DictReader(file) if row.get("train/loss")]
    state = torch.load(last, weights_only=True)
    return {key: state[key] for key in ("state_dict", "optimizer_states", "global_step", "source")}, losses


def same(a: object, b: object) -> bool:
    """Equality to the last bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> None:
    """Kill until there have been enough kills, and say how the runs ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    moments = random.Random(options.seed)
    whole: dict[tuple[str, int], tuple[Any, float]] = {}
    kills = runs = 0
    while kills < options.kills:
        method, workers = options.methods[runs % len(options.methods)], 2 * (runs // len(options.methods) % 2)
        if (method, workers) not in whole:
            folder = options.folder / f"whole-{method}-{workers}"
            folder.mkdir(parents=True)
            start = time.monotonic()
            run(method, folder, workers)
            whole[method, workers] = (left(method, folder), time.monotonic() - start)
        expected, seconds = whole[method, workers]
        folder = options.folder / f"killed-{runs}-{method}-{workers}"
        folder.mkdir(parents=True)
        here, planned = 0, moments.randint(1, 4)
        while not run(method, folder, workers, None if here == planned else moments.uniform(0.3, 1.1) * seconds):
            here += 1
        kills, runs = kills + here, runs + 1
        equal = same(left(method, folder), expected)
        print(f"{method} with {workers} workers: killed {here} times, {'equal' if equal else 'NOT EQUAL'}", flush=True)
        if not equal:
            sys.exit(f"{folder} differs from {options.folder / f'whole-{method}-{workers}'}")
    print(f"{kills} kills in {runs} runs: every run ended like one that was never killed.")


if __name__ == "__main__":
    main()
