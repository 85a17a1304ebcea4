"""Kills and stops runs at random moments, resumes them from `last`, and compares the result with uninterrupted runs.

Run: python tools/kill_study.py --kills 50         (half a minute per kill on one core; the embedded models, no download)
     python tools/kill_study.py --kills 15 --devices 2 --strategy fsdp2

Each method is trained once without interruption. Then it is started repeatedly with `--ckpt_path last` and interrupted after a
random time, up to four times, before it may finish. About half of the interruptions are kills (SIGKILL); the others are SIGTERM,
`max_time`, `max_steps` or a callback that sets `trainer.should_stop`. Weights, optimiser state and logged losses must be bitwise
equal. On several ranks a kill hits all processes, rank 0 alone or another rank alone; in each case no process may be left half a
minute later. Processes are found in /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback

from lit_distill.cli.runs import last_checkpoint
from lit_distill.distributed import read_checkpoint

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
IN_PHASES = {"model.source.mini_batch_size": 8, "trainer.val_check_interval": 2}
OF_METHOD = {
    "minillm_quickstart": {"model.source.mini_batch_size": 8, "trainer.val_check_interval": 1},
    **dict.fromkeys(("quickstart", "dpkd_quickstart", "gkd_quickstart"), IN_PHASES),
}
SOFT = ("SIGTERM", "max_time", "max_steps", "should_stop")
NO_STOP = {"distillm_quickstart": {"max_steps"}}
"""Stops that are not used for a method: its schedule depends on the length of the run."""
PATIENCE = 30.0
"""Seconds until all processes must have ended after one was killed; torch.distributed itself would wait 1800."""


class StopAfter(Callback):
    """Stops a run after ``batches`` batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """Count the batch, and stop if it was the last one."""
        self.batches -= 1
        trainer.should_stop = trainer.should_stop or self.batches <= 0


class Plan(NamedTuple):
    """Settings of one run."""

    method: str
    workers: int
    """Number of data-loader workers of each rank."""
    devices: int
    strategy: str

    def command(self, folder: Path, stop: dict[str, Any] | None = None) -> list[str]:
        """The command `lit-distill fit` for a small version of the method's quickstart; ``stop`` are settings that end it early."""
        settings = {
            **SMALL,
            **OF_METHOD.get(self.method, {}),
            "data.num_workers": self.workers,
            "trainer.default_root_dir": folder,
            "trainer.devices": self.devices,
            "trainer.strategy": self.strategy,
            **(stop or {}),
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        start = [sys.executable, "-m", "lit_distill", "fit", "--config", str(CONFIGS / f"{self.method}.yaml")]
        return [*start, *options, "--ckpt_path", "last"]


class Job:
    """A command in its own session, so that exactly its processes can be found and killed."""

    def __init__(self, command: list[str], output: Any, **settings: Any) -> None:
        self.leader = subprocess.Popen(  # noqa: S603 - ours
            command, stdout=output, stderr=output, start_new_session=True, **settings
        )

    def living(self) -> dict[int, int]:
        """Ids of the processes that have not ended, with the ids of their parents."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # the process has just ended
                state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.leader.pid and state not in "ZX":
                    found[int(stat.parent.name)] = int(parent)
        return found

    def other_ranks(self) -> list[int]:
        """The process ids of rank 1 and higher; empty until rank 0 has started them."""
        found = []
        for process, parent in self.living().items():
            with suppress(OSError):
                if parent == self.leader.pid and b"\0LOCAL_RANK=" in Path(f"/proc/{process}/environ").read_bytes():
                    found.append(process)
        return sorted(found)

    def terminate(self) -> str:
        """Send SIGTERM to all processes, as at the shutdown of a machine."""
        with suppress(ProcessLookupError):
            os.killpg(self.leader.pid, signal.SIGTERM)
        return "SIGTERM"

    def kill(self, who: str, moments: random.Random | None = None) -> str:
        """Send SIGKILL to ``who``: "all", "rank 0" or "another rank". Returns who was killed: all, if no other rank runs yet."""
        others = self.other_ranks() if who == "another rank" else []
        with suppress(ProcessLookupError):
            if others:
                os.kill((moments or random).choice(others), signal.SIGKILL)
            elif who == "rank 0":
                os.kill(self.leader.pid, signal.SIGKILL)
            else:
                os.killpg(self.leader.pid, signal.SIGKILL)
                return "all"
        return who

    def ended(self, patience: float = PATIENCE) -> float | None:
        """Seconds until the last process ended; None if one was left after ``patience`` seconds (it is then killed)."""
        start = time.monotonic()
        while self.living() or self.leader.poll() is None:
            if time.monotonic() - start > patience:
                os.killpg(self.leader.pid, signal.SIGKILL)
                return None
            time.sleep(0.05)
        return time.monotonic() - start


class End(NamedTuple):
    """How a job ended."""

    killed: str | None
    """Who was killed, or SIGTERM; None if it was not interrupted."""
    seconds: float
    """Time from the interruption to the end of the last process."""


def run(
    plan: Plan,
    folder: Path,
    moments: random.Random | None = None,
    seconds: float | None = None,
    terminate: bool = False,
    stop: dict[str, Any] | None = None,
) -> End:
    """Run a job: kill or terminate it after ``seconds``, or let the settings ``stop`` end it."""
    log, killed = folder / "output.txt", None
    with log.open("ab") as output:
        job = Job(plan.command(folder, stop), output, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
        try:
            job.leader.wait(seconds)
        except subprocess.TimeoutExpired:
            assert moments is not None
            who = moments.choice(["all", "rank 0", "another rank"] if plan.devices > 1 else ["all"])
            killed = job.terminate() if terminate else job.kill(who, moments)
        except BaseException:
            job.kill("all")
            raise
        outlived = job.ended()
    if outlived is None:
        sys.exit(
            f"{plan.method}: processes still ran {PATIENCE:.0f} s after the end of {killed or 'the run'}; see {log}"
        )
    if job.leader.returncode and killed is None:
        sys.exit(f"{plan.method} ended with status {job.leader.returncode}; see {log}")
    if not job.leader.returncode:  # the kill came when the run had finished
        killed = None
    return End(killed, outlived)


def soft_stop(kind: str, moments: random.Random, folder: Path, method: str, seconds: float) -> dict[str, Any]:
    """Settings that stop a run some time after it resumes from its last checkpoint, unless it finishes before."""
    last = last_checkpoint(folder, method)
    state = torch.load(last, map_location="meta", weights_only=True, mmap=True) if last else {}
    if kind == "max_time":  # includes the time before the checkpoint, if it is stored there
        spent = state.get("callbacks", {}).get("Timer", {}).get("time_elapsed", {}).get("train", 0.0)
        return {"trainer.max_time": f"00:00:00:{int(spent + moments.uniform(0.1, 0.5) * seconds) + 1:02}"}
    if kind == "max_steps":
        return {"trainer.max_steps": min(24, state.get("global_step", 0) + moments.randint(1, 8))}
    stop = f"[{{class_path: kill_study.StopAfter, init_args: {{batches: {moments.randint(1, 6)}}}}}]"
    return {"trainer.callbacks": stop}


def left(method: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The state in the last checkpoint, and the logged losses."""
    last = last_checkpoint(folder, method)  # a process killed before its first checkpoint leaves an empty version
    assert last is not None
    with (last.parent.parent / "metrics.csv").open(newline="") as file:
        losses = [f"{row['step']}: {row['train/loss']}" for row in csv.DictReader(file) if row.get("train/loss")]
    state = read_checkpoint(last)
    return {key: state[key] for key in ("state_dict", "optimizer_states", "global_step", "source")}, losses


def same(a: object, b: object) -> bool:
    """Whether two nested structures of tensors are bitwise equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> None:
    """Interrupt runs until ``--kills`` interruptions are done, and print how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="total number of interruptions, including soft stops")
    parser.add_argument("--only_kills", action="store_true", help="no soft stops")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--devices", type=int, default=1, help="number of processes of a run")
    parser.add_argument("--strategy", choices=("auto", "ddp", "fsdp2"), default="auto")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for the moments of interruption and for who is killed"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    moments = random.Random(options.seed)
    whole: dict[Plan, tuple[Any, float]] = {}
    who: Counter[str] = Counter()
    longest, runs = 0.0, 0
    kinds = ["kill"] * (1 if options.only_kills else len(SOFT)) + ([] if options.only_kills else list(SOFT))
    while who.total() < options.kills:
        method, workers = options.methods[runs % len(options.methods)], 2 * (runs // len(options.methods) % 2)
        plan = Plan(method, workers, options.devices, options.strategy)
        if plan not in whole:
            folder = options.folder / f"whole-{method}-{workers}"
            folder.mkdir(parents=True)
            start = time.monotonic()
            run(plan, folder)
            whole[plan] = (left(method, folder), time.monotonic() - start)
        expected, seconds = whole[plan]
        folder = options.folder / f"killed-{runs}-{method}-{workers}"
        folder.mkdir(parents=True)
        here: list[str] = []
        for _ in range(moments.randint(1, 4)):
            kind = moments.choice([kind for kind in kinds if kind not in NO_STOP.get(method, ())])
            if kind in ("kill", "SIGTERM"):
                limit = moments.uniform(0.3, 1.0) * seconds
                end = run(plan, folder, moments, limit, terminate=kind == "SIGTERM")
            else:
                end = run(plan, folder, stop=soft_stop(kind, moments, folder, method, seconds))
                end = end._replace(killed=kind)
            longest = max(longest, end.seconds)
            here += [end.killed] if end.killed else []
        longest = max(longest, run(plan, folder).seconds)
        who.update(here)
        runs += 1
        equal = same(left(method, folder), expected)
        names = ", ".join(here) or "never"
        print(f"{method} with {workers} workers: interrupted: {names}; {'equal' if equal else 'NOT EQUAL'}", flush=True)
        if not equal:
            sys.exit(f"{folder} differs from {options.folder / f'whole-{method}-{workers}'}")
    print(f"{who.total()} interruptions in {runs} runs: every run has the same result as an uninterrupted run.")
    print(
        f"{', '.join(f'{name}: {count}' for name, count in who.items())}; all processes ended within {longest:.1f} s."
    )


if __name__ == "__main__":
    main()
