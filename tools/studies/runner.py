"""The runs of a study, each its own `lit-distill fit` and `test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from lit_distill.files import write_text
from lit_distill.report.curves import read_curves
from lit_distill.report.record import read_report
from studies.plan import CHECKOUT, Method, Study, Tuning, starts_in

QUICK: dict[str, Any] = {"trainer.max_steps": 2, "trainer.limit_val_batches": 1, "trainer.limit_test_batches": 1}


class Runner:
    """Does the runs of a study that are not finished.

    Args:
        study: the study.
        quick: two steps of each run, in a folder of their own.
    """

    def __init__(self, study: Study, quick: bool = False) -> None:
        self.study = study
        self.quick = quick
        self.folder = study.folder / "quick" if quick else study.folder
        self.failed: list[str] = []
        self.stale: set[tuple[str, int]] = set()
        """Runs that were done with other settings; they are in no table."""
        self.chosen: dict[str, dict[str, Any]] = {}
        """The best settings of `tune`, by method."""
        self._told: set[str] = set()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False
        self._lock = Lock()
        """Held where a process begins, so that none begins once the study is stopped, and where something is told once."""

    def run_all(self, methods: Sequence[str], seeds: Sequence[int], jobs: int) -> None:
        """Train and test each method with each seed, ``jobs`` runs at a time; one that fails does not end the others."""
        with ThreadPoolExecutor(jobs) as pool, self._stopped_with(pool):
            tuning = None if self.quick else self.study.tune
            started = [*seeds, *([tuning.seed] if tuning else [])]
            begun = [(name, seed) for seed in started for name in self.study.starts_of(methods)]
            list(pool.map(lambda pair: self.run(pair[0], self.study.starts[pair[0]], pair[1]), begun))
            if tuning:
                self._tune(methods, tuning, pool)
                self.choose(methods, tuning)
            each = [(name, seed) for seed in seeds for name in methods if name in self.chosen or not tuning]
            list(pool.map(lambda pair: self.run(pair[0], self.study.methods[pair[0]], pair[1]), each))

    @contextmanager
    def _stopped_with(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Inside, an error or a signal ends the runs that are under way, and those that have not begun stay undone."""
        try:
            yield
        except BaseException as error:
            with self._lock:
                self._is_stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):  # which the terminal sends to all of them
                for process in list(self._processes):
                    process.terminate()  # it saves its checkpoint, with which the same command goes on
            raise

    def read_all(self, methods: Sequence[str], seeds: Sequence[int]) -> None:
        """Run nothing; what is finished counts."""
        if self.study.tune is not None and not self.quick:
            self.choose(methods, self.study.tune)
        runs = {**self.study.starts, **self.study.methods}
        for name in self.study.with_starts(methods):
            for seed in seeds:
                self._is_trained(name, runs[name], seed, self.chosen.get(name, {}))

    def _trials(self, methods: Sequence[str], tuning: Tuning) -> dict[str, list[dict[str, Any]]]:
        """The settings to try, by the method that is tuned itself."""
        tuned = {name: self.study.methods[name].tune for name in methods}
        tried = dict.fromkeys(other if isinstance(other, str) else name for name, other in tuned.items())
        return {name: tuning.trials(self.study.methods[name]) for name in tried}

    def _tune(self, methods: Sequence[str], tuning: Tuning, pool: ThreadPoolExecutor) -> None:
        """Try the settings of every method, unless that is done."""
        trials = self._trials(methods, tuning)
        each = [(name, number, trial) for name, tried in trials.items() for number, trial in enumerate(tried)]

        def attempt(trial: tuple[str, int, Mapping[str, Any]]) -> None:
            name, number, settings = trial
            run = f"{name}.{number}"
            trained = self._train(run, self.study.methods[name], tuning.seed, settings) is not None
            if trained and not self.course(run, tuning.seed, tuning.metric):
                raise ValueError(
                    f"tune.metric: {run} has trained, but {tuning.metric} was not logged. {self._logged(run)}"
                )

        list(pool.map(attempt, each[:1]))  # a metric that is not logged is found here
        list(pool.map(attempt, each[1:]))

    def choose(self, methods: Sequence[str], tuning: Tuning) -> None:
        """Choose each method's best settings, of those that were tried."""
        for name, tried in self._trials(methods, tuning).items():
            for number, settings in enumerate(tried):
                self._is_trained(f"{name}.{number}", self.study.methods[name], tuning.seed, settings)
            courses = [self.course(f"{name}.{number}", tuning.seed, tuning.metric) for number in range(len(tried))]
            best = tuning.best([[value for _, value in course] for course in courses])
            if best is not None:
                self.chosen[name] = tried[best]
        for name in methods:
            other = self.study.methods[name].tune
            if isinstance(other, str) and other in self.chosen:
                self.chosen[name] = self.chosen[other]

    def run(self, name: str, method: Method, seed: int) -> None:
        """Train and test once, unless that is done; the output goes to a log beside the runs."""
        words = self._train(name, method, seed, self.chosen.get(name, {}))
        if words is None or self.report(name, seed) is not None:
            return
        checkpoint = "last" if self.quick else self.study.checkpoint
        test = {**self.study.test.arguments, **(QUICK if self.quick else {})}
        log = self.folder / f"seed_{seed}" / f"{name}.log"
        if self._call(log, "test", [*words, *words_of(test, {}), "--ckpt_path", checkpoint]):
            self._check_metrics(name, seed)
        elif not self._is_stopped:
            self.failed.append(f"{name}, seed {seed}, test: {log}: {_last_line(log)}")

    def _check_metrics(self, name: str, seed: int) -> None:
        """Tell at once which columns the first test has no value for: hours later is too late."""
        found = (self.report(name, seed) or {}).get("metrics", {})
        with self._lock:
            missing = [metric for metric in self.study.metrics if metric not in found and metric not in self._told]
            self._told.update(self.study.metrics)
        for metric in missing:
            print(f"metrics: the test of {name} has no {metric}; it has {', '.join(sorted(found))}.", flush=True)

    def _train(self, name: str, method: Method, seed: int, chosen: Mapping[str, Any]) -> list[str] | None:
        """Train once, unless that is done, and return the arguments of the command line; None if it failed."""
        files, given = self._made_of(method, chosen)
        root = self.folder / f"seed_{seed}"
        own = {"seed_everything": seed, "run_name": name, "trainer.default_root_dir": str(root)}
        own |= {"trainer.enable_progress_bar": False, **(QUICK if self.quick else {})}
        configs = [word for file in files for word in ("--config", str(CHECKOUT / file))]
        starts = {start: self.start_of(start, seed) for start in starts_in(given)}
        if failed := [start for start, folder in starts.items() if not folder]:
            self.failed.append(f"{name}, seed {seed}: {failed[0]}, with which it begins, has exported no student")
            return None
        words = [*configs, *words_of({**given, **own}, starts)]
        if self._is_trained(name, method, seed, chosen):
            return None if (name, seed) in self.stale else words
        root.mkdir(parents=True, exist_ok=True)
        is_resumed, began = (root / name).exists(), time.monotonic()
        done = self._call(root / f"{name}.log", "fit", [*words, "--ckpt_path", "last"])
        if self._is_stopped and not done:
            return None
        seconds = time.monotonic() - began
        print(f"{name}, seed {seed}: {'trained' if done else 'failed'} in {seconds:.0f} s", flush=True)
        if not done:
            self.failed.append(f"{name}, seed {seed}: {root / name}.log: {_last_line(root / f'{name}.log')}")
            return None
        record = {"settings": self._settings(method, chosen), "seconds": None if is_resumed else seconds}
        write_text(self._record_file(name, seed), json.dumps(record) + "\n")
        return words

    def _made_of(self, method: Method, chosen: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """Config files and arguments of a run."""
        given = {**self.study.arguments, **method.arguments, **chosen}
        return [*self.study.configs, *method.configs], given

    def _record_file(self, name: str, seed: int) -> Path:
        """What is written once a run has trained: its settings and its time."""
        return self.folder / f"seed_{seed}" / f"{name}.json"

    def _settings(self, method: Method, chosen: Mapping[str, Any]) -> list[Any]:
        """All that decides what a run gives, beside its seed."""
        files, given = self._made_of(method, chosen)
        texts = {file: (CHECKOUT / file).read_text(encoding="utf-8") for file in files}
        settings = [texts, given, self.study.test.arguments, self.study.checkpoint]
        if starts := starts_in(given):
            settings.append({name: self._settings(self.study.starts[name], {}) for name in starts})
        plain: list[Any] = json.loads(json.dumps(settings))
        return plain

    def _is_trained(self, name: str, method: Method, seed: int, chosen: Mapping[str, Any]) -> bool:
        """Whether a run has trained; one that did so with other settings is said to be stale."""
        written = self._record_file(name, seed)
        if not written.is_file():
            return False
        is_stale = json.loads(written.read_text(encoding="utf-8"))["settings"] != self._settings(method, chosen)
        if is_stale and (name, seed) not in self.stale:
            self.stale.add((name, seed))
            self.failed.append(
                f"{name}, seed {seed}: was run with other settings; "
                f"to run it again, remove {written} and {written.with_suffix('')}"
            )
        return True

    def _call(self, log: Path, command: str, words: Sequence[str]) -> bool:
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
        line = [sys.executable, "-m", "lit_distill", command, *words]
        with log.open("a", encoding="utf-8") as file:
            print("$", *line, file=file, flush=True)
            with self._lock:
                if self._is_stopped:
                    return False
                process = subprocess.Popen(line, stdout=file, stderr=file, env={**os.environ, **threads})  # noqa: S603 - own command
                self._processes.add(process)
            try:
                return not process.wait()
            finally:
                self._processes.discard(process)

    def start_of(self, name: str, seed: int) -> str:
        """The folder of the student that a start has exported; empty if it has failed, or was run with other settings."""
        exports = [] if (name, seed) in self.stale else self._versions(name, seed, "export")
        names = [exports[-1] / name for name in (self.study.checkpoint, "last")] if exports else []
        return next((str(folder.resolve()) for folder in names if folder.is_dir()), "")

    def _versions(self, name: str, seed: int, what: str) -> list[Path]:
        """A file or folder of each version of a run, the newest last."""
        found = (self.folder / f"seed_{seed}" / name).glob(f"version_*/{what}")
        return sorted(found, key=lambda path: int(path.parent.name.removeprefix("version_")))

    def report(self, name: str, seed: int) -> dict[str, Any] | None:
        """The report of the newest test of a run; None if it was not tested, or with other settings."""
        if (name, seed) in self.stale:
            return None
        files = self._versions(name, seed, "report.json")
        return read_report(files[-1]) if files else None

    def seconds(self, name: str, seed: int) -> float | None:
        """How long a run trained, with its start and its validations; None if it was interrupted."""
        written = self._record_file(name, seed)
        record = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
        seconds: float | None = None if (name, seed) in self.stale else record.get("seconds")
        return seconds

    def _logged(self, name: str) -> str:
        """The metrics that a trial has logged in its validations."""
        assert self.study.tune is not None
        heads = [
            file.open(encoding="utf-8").readline() for file in self._versions(name, self.study.tune.seed, "metrics.csv")
        ]
        found = sorted({word.strip() for head in heads for word in head.split(",") if word.startswith("val/")})
        return f"There are {', '.join(found)}."

    def training_metric(self, name: str, seed: int, metric: str) -> float | None:
        """The last value of a metric in the training of a run; None if it was not logged."""
        course = self.course(name, seed, metric)
        return course[-1][1] if course else None

    def course(self, name: str, seed: int, metric: str) -> list[tuple[float, float]]:
        """Steps and values of a metric in the training of a run; none if it has not finished, or had other settings."""
        if (name, seed) in self.stale or not self._record_file(name, seed).is_file():
            return []
        curves = [read_curves(file, [metric]).get(metric) for file in self._versions(name, seed, "metrics.csv")]
        last = next((curve for curve in reversed(curves) if curve), {"steps": [], "values": []})
        return list(zip(last["steps"], last["values"], strict=True))


def _last_line(log: Path) -> str:
    """What a run that failed said at its end."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["(nothing)"])[-1]


def words_of(arguments: Mapping[str, Any], starts: Mapping[str, str]) -> list[str]:
    """Arguments of the command line, starts replaced by their folders; values that are no text as JSON, which is YAML."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    for start, folder in starts.items():
        texts = {key: text.replace(f"{{{start}}}", folder) for key, text in texts.items()}
    return [word for key, text in texts.items() for word in (f"--{key}", text)]
