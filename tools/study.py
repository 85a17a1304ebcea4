"""Runs a study: several methods with several seeds, each as its own `lit-distill fit` and `test`, then one table and one page.

Run: python tools/study.py tools/studies/on_policy.yaml              (hours; finished runs are not repeated)
     python tools/study.py tools/studies/results/methods.json          (its table again)
     python tools/study.py STUDY --only minillm top_k --seeds 1 --quick     (two steps of each: whether everything runs)

A study is a YAML file:

    folder: runs/studies/NAME         runs, table.md, results.json, curves.png and compare.html
    seeds: [1, 2, 3]                  seed_everything of each run
    configs: [FILE, ...]              configs of every run; relative to the checkout
    arguments: {KEY: VALUE, ...}      arguments of every run, such as trainer.max_steps: 500
    start: {arguments: ...}           optional: one run for each seed, whose student the others may begin with
    tune:                             optional: every combination is tried once, and each method is run with its own best
      arguments: {KEY: [VALUE, ...], ...}
      seed: 0                         of these trials; no seed of the study
      metric: val/exact_match         its best value in the training decides; the test data are not looked at
      mode: max                       or min
    methods:
      NAME: {configs: ..., arguments: ...}          added to those of every run; {start} in a value is the folder of that student
        tune: {KEY: [VALUE, ...]}                   other values to try for this method, in place of tune.arguments of the same key;
                                                    or NAME: what that method has chosen
    test: {arguments: ...}            added in the test alone
    checkpoint: best                  or last: which checkpoint is tested, and exported by start
    metrics: [exact_match, ...]       of the test, the columns of the table
    training_metrics: [train/..., ...]   the last value of each in the training (metrics.csv), further columns
    curves: [val/..., ...]            metrics of the training to draw into curves.png, the mean over the seeds
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from lit_distill.files import write_text
from lit_distill.report.curves import mean_curve, read_curves
from lit_distill.report.figures import draw_curves, make_figure
from lit_distill.report.metrics import metric_of
from lit_distill.report.page import render_page
from lit_distill.report.record import find_reports, read_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
CHECKOUT = Path(__file__).parent.parent
START = "start"
QUICK: dict[str, Any] = {"trainer.max_steps": 2, "trainer.limit_val_batches": 1, "trainer.limit_test_batches": 1}
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t for a two-sided 95 % interval with 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Method:
    """What a run gets beside what every run gets."""

    configs: Sequence[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] | str = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """What is tried for every method, and what decides."""

    arguments: Mapping[str, Sequence[Any]]
    metric: str
    mode: Literal["max", "min"] = "max"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode: expected max or min, got {self.mode!r}.")
        _check_grid(self.arguments, "arguments")

    def trials(self, method: Method) -> list[dict[str, Any]]:
        """The settings to try for a method; none if it takes those of another one."""
        if isinstance(method.tune, str):
            return []
        grid = {**self.arguments, **method.tune}
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def best(self, values: Sequence[float | None]) -> int | None:
        """The position of the best value; None if there is none."""
        sign = -1 if self.mode == "max" else 1
        found = [(sign * value, position) for position, value in enumerate(values) if value is not None]
        return min(found)[1] if found else None


@dataclass(frozen=True)
class Study:
    """A study as its YAML describes it; see the top of this file."""

    folder: Path
    methods: Mapping[str, Method]
    seeds: Sequence[int] = (1, 2, 3)
    configs: Sequence[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    start: Method | None = None
    tune: Tuning | None = None
    test: Method = Method()
    checkpoint: Literal["best", "last"] = "best"
    metrics: Sequence[str] = ("rouge_l", "exact_match", "perplexity")
    training_metrics: Sequence[str] = ()
    curves: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.start is None and any("{start}" in str(method.arguments) for method in self.methods.values()):
            raise ValueError("{start} is used, but there is no start.")
        if START in self.methods:
            raise ValueError(f"methods: none may be called {START}.")
        if self.checkpoint not in ("best", "last"):
            raise ValueError(f"checkpoint: expected best or last, got {self.checkpoint!r}.")
        if not isinstance(self.seeds, list | tuple) or len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds: expected a list of different numbers, got {self.seeds}.")
        files = [*self.configs, *(file for method in self.methods.values() for file in method.configs)]
        if missing := [file for file in files if not (CHECKOUT / file).is_file()]:
            raise ValueError(f"configs: there is no file {CHECKOUT / missing[0]}.")
        self._check_tuning()

    def _check_tuning(self) -> None:
        if self.tune is None:
            if tuned := [name for name, method in self.methods.items() if method.tune]:
                raise ValueError(f"methods.{tuned[0]}.tune: there is no tune for all methods, with its metric. Add it.")
            return
        if self.tune.seed in self.seeds:
            raise ValueError(f"tune.seed: {self.tune.seed} is one of seeds. Give another one.")
        for name, method in self.methods.items():
            if isinstance(method.tune, str):
                other = self.methods.get(method.tune)
                if other is None or isinstance(other.tune, str):
                    raise ValueError(f"methods.{name}.tune: {method.tune} is no method that is tuned itself.")
            else:
                _check_grid(method.tune, f"methods.{name}.tune")

    @classmethod
    def read(cls, file: Path) -> Study:
        """Read a study.

        Raises:
            ValueError: naming the file and the key that is missing, unknown or wrong.
        """
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            _check_keys(cls, values, "", {"folder", "methods"})
            values["methods"] = _methods(values["methods"])
            kinds = {START: Method, "test": Method}
            values |= {key: _read(kind, values[key], key) for key, kind in kinds.items() if key in values}
            if "tune" in values:
                values["tune"] = _read(Tuning, values["tune"], "tune", {"arguments", "metric"})
            return cls(**{**values, "folder": Path(values["folder"])})
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{file}: {error}") from error


def _methods(given: Any) -> dict[str, Method]:
    if not isinstance(given, dict) or not given:
        raise ValueError(f"methods: expected methods by name, got {given}.")
    return {name: _read(Method, value or {}, f"methods.{name}") for name, value in given.items()}


def _read(kind: type[T], values: Any, key: str, required: Collection[str] = ()) -> T:
    _check_keys(kind, values, key, required)
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from error


def _check_keys(kind: Any, values: Any, key: str, required: Collection[str]) -> None:
    known = [part.name for part in fields(kind)]
    if not isinstance(values, dict) or not values.keys() <= set(known) or not set(required) <= values.keys():
        given = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)
        need = f", of which {' and '.join(sorted(required))} must be there" if required else ""
        raise ValueError(f"{key or 'the study'}: expected keys out of {', '.join(known)}{need}; got {given}.")


def _check_grid(grid: Any, key: str) -> None:
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"{key}: expected a list of values for each key, got {grid}.")


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

    def run_all(self, methods: Sequence[str], seeds: Sequence[int], jobs: int) -> None:
        """Train and test each method with each seed, ``jobs`` runs at a time; one that fails does not end the others."""
        with ThreadPoolExecutor(jobs) as pool:
            if self.study.start is not None:
                started = [*seeds, *([self.study.tune.seed] if self.study.tune else [])]
                list(pool.map(lambda seed: self.run(START, self.study.start or Method(), seed), started))
            if self.study.tune is not None and not self.quick:
                self._tune(methods, self.study.tune, pool)
            is_tuned = self.study.tune is not None and not self.quick
            each = [(name, seed) for seed in seeds for name in methods if name in self.chosen or not is_tuned]
            list(pool.map(lambda pair: self.run(pair[0], self.study.methods[pair[0]], pair[1]), each))

    def _tune(self, methods: Sequence[str], tuning: Tuning, pool: ThreadPoolExecutor) -> None:
        """Try the settings of every method, unless that is done, and choose each method's best."""
        followed = {name: method.tune for name, method in self.study.methods.items() if isinstance(method.tune, str)}
        tried = dict.fromkeys(followed.get(name, name) for name in methods)
        trials = {name: tuning.trials(self.study.methods[name]) for name in tried}
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
        for name, tried in trials.items():
            courses = [self.course(f"{name}.{number}", tuning.seed, tuning.metric) for number in range(len(tried))]
            choice = max if tuning.mode == "max" else min
            best = tuning.best([choice(value for _, value in course) if course else None for course in courses])
            if best is not None:
                self.chosen[name] = tried[best]
        self.chosen |= {name: self.chosen[other] for name, other in followed.items() if other in self.chosen}

    def run(self, name: str, method: Method, seed: int) -> None:
        """Train and test once, unless that is done; the output goes to a log beside the runs."""
        words = self._train(name, method, seed, self.chosen.get(name, {}))
        if words is None or self.report(name, seed) is not None:
            return
        checkpoint = "last" if self.quick else self.study.checkpoint
        test = {**self.study.test.arguments, **(QUICK if self.quick else {})}
        log = self.folder / f"seed_{seed}" / f"{name}.log"
        if not self._call(log, "test", [*words, *_words(test, ""), "--ckpt_path", checkpoint]):
            self.failed.append(f"{name}, seed {seed}, test: {log}: {_last_line(log)}")

    def _train(self, name: str, method: Method, seed: int, chosen: Mapping[str, Any]) -> list[str] | None:
        """Train once, unless that is done, and return the arguments of the command line; None if it failed."""
        files = [*self.study.configs, *method.configs]
        given = {**self.study.arguments, **method.arguments, **chosen}
        root = self.folder / f"seed_{seed}"
        own = {"seed_everything": seed, "run_name": name, "trainer.default_root_dir": str(root)}
        own |= {"trainer.enable_progress_bar": False, **(QUICK if self.quick else {})}
        configs = [word for file in files for word in ("--config", str(CHECKOUT / file))]
        words = [*configs, *_words({**given, **own}, self._start_of(seed))]
        made_of = {file: (CHECKOUT / file).read_text(encoding="utf-8") for file in files}
        record = {"settings": [made_of, given, dict(self.study.test.arguments), self.study.checkpoint]}
        written = root / f"{name}.json"
        before = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
        if "seconds" in before:
            if before["settings"] == json.loads(json.dumps(record["settings"])):
                return words
            self.stale.add((name, seed))
            self.failed.append(
                f"{name}, seed {seed}: was run with other settings; to run it again, remove {written} and {root / name}"
            )
            return None
        root.mkdir(parents=True, exist_ok=True)
        is_resumed, began = (root / name).exists(), time.monotonic()
        done = self._call(root / f"{name}.log", "fit", [*words, "--ckpt_path", "last"])
        seconds = time.monotonic() - began
        print(f"{name}, seed {seed}: {'trained' if done else 'failed'} in {seconds:.0f} s", flush=True)
        if not done:
            self.failed.append(f"{name}, seed {seed}: {root / name}.log: {_last_line(root / f'{name}.log')}")
            return None
        write_text(written, json.dumps({**record, "seconds": None if is_resumed else seconds}) + "\n")
        return words

    def _call(self, log: Path, command: str, words: Sequence[str]) -> bool:
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
        line = [sys.executable, "-m", "lit_distill", command, *words]
        with log.open("a", encoding="utf-8") as file:
            print("$", *line, file=file, flush=True)
            environment = {**os.environ, **threads}
            return not subprocess.run(line, stdout=file, stderr=file, env=environment, check=False).returncode  # noqa: S603 - own command

    def _start_of(self, seed: int) -> str:
        exports = self._versions(START, seed, "export")
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
        written = self.folder / f"seed_{seed}" / f"{name}.json"
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
        """Steps and values of a metric in the training of a run."""
        curves = [read_curves(file, [metric]).get(metric) for file in self._versions(name, seed, "metrics.csv")]
        last = next((curve for curve in reversed(curves) if curve), {"steps": [], "values": []})
        return list(zip(last["steps"], last["values"], strict=True))


def _last_line(log: Path) -> str:
    """What a run that failed said at its end."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["(nothing)"])[-1]


def _words(arguments: Mapping[str, Any], start: str) -> list[str]:
    """Arguments of the command line; values that are no text as JSON, which is YAML."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return [word for key, text in texts.items() for word in (f"--{key}", text.replace("{start}", start))]


def interval(values: Sequence[float]) -> str:
    """Mean ± half of the 95 % interval by Student's t; the value alone if there is one."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    half = T_95[min(len(values), len(T_95) + 1) - 2] * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3g} ± {half:.2g}"


def summarize(runner: Runner, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """The values over the seeds of every metric of every method, as far as they are known."""
    study = runner.study
    names = ([START] if study.start else []) + list(methods)
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        reports = [report for seed in seeds if (report := runner.report(name, seed)) is not None]
        tested = {m: [r["metrics"][m] for r in reports if r["metrics"].get(m) is not None] for m in study.metrics}
        trained = {
            m: [v for seed in seeds if (v := runner.training_metric(name, seed, m)) is not None]
            for m in study.training_metrics
        }
        timed = [seconds for seed in seeds if (seconds := runner.seconds(name, seed)) is not None]
        found[name] = {**tested, **trained, "seconds": timed}
    return found


def markdown(results: Mapping[str, Mapping[str, Sequence[float]]], chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """The table: a row for each method, mean ± 95 % interval, and the settings that were chosen on validation."""
    columns = list(dict.fromkeys(metric for values in results.values() for metric, found in values.items() if found))
    shown = {column: metric_of(column) for column in columns}
    tuned = list(dict.fromkeys(key for values in chosen.values() for key in values))
    heads = [*(metric.head for metric in shown.values()), *(key.rpartition(".")[2] for key in tuned)]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name, values in results.items():
        scaled = [[value * metric.scale for value in values.get(column, ())] for column, metric in shown.items()]
        cells = [interval(found) if found else "" for found in scaled]
        cells += [str(chosen.get(name, {}).get(key, "")) for key in tuned]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def stored_table(file: Path) -> str:
    """The table of stored results."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    return markdown(stored["results"], stored.get("tuned", {}))


def draw(runner: Runner, methods: Sequence[str], seeds: Sequence[int], file: Path) -> None:
    """Draw the mean course of every metric of ``curves``, a line for each method."""

    def panels(figure: Figure) -> None:
        rows = -(-len(runner.study.curves) // 2)
        places = figure.subplots(rows, 2, squeeze=False).flatten()
        for axes, metric in zip(places, runner.study.curves, strict=False):
            curves = []
            for style, name in enumerate(methods, start=1):
                courses = [course for seed in seeds if (course := runner.course(name, seed, metric))]
                if courses:
                    curves.append(mean_curve(name, style, courses))
            draw_curves(axes, curves, "step")
            axes.set_title(metric)
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    height = 230 * -(-len(runner.study.curves) // 2) + 20 * len(methods) / 3
    make_figure(panels, width=720, height=height).savefig(file)


def write_results(runner: Runner, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Print the table, and write it with the results, the curves and the page."""
    study = runner.study
    results = summarize(runner, methods, seeds)
    for metric in (*study.metrics, *study.training_metrics):
        if results and not any(values.get(metric) for values in results.values()):
            print(f"{metric}: no run has it.")
    table = markdown(results, runner.chosen)
    print(table)
    write_text(runner.folder / "table.md", table)
    write_text(
        runner.folder / "results.json",
        json.dumps({"seeds": seeds, "tuned": runner.chosen, "results": results}, indent=1) + "\n",
    )
    if study.curves:
        draw(runner, methods, seeds, runner.folder / "curves.png")
    tested = [place for seed in seeds for name in methods if (place := runner.folder / f"seed_{seed}" / name).is_dir()]
    reports = [
        report for place in tested if any(place.glob("*/report.json")) for report in find_reports(place, "study")
    ]
    if reports:
        write_text(runner.folder / "compare.html", render_page(reports))
        print(f"Page: {runner.folder / 'compare.html'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the missing runs; write and print the results; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", type=Path, help="YAML of a study, or the results.json of one: then its table is printed again"
    )
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="some of the methods")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the study's")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread; 2 by default")
    parser.add_argument("--quick", action="store_true", help="two steps of each run, to try the study")
    options = parser.parse_args(arguments)
    if options.study.suffix == ".json":
        print(stored_table(options.study))
        return 0
    try:
        study = Study.read(options.study)
    except ValueError as error:
        parser.error(str(error))
    methods, seeds = options.only or list(study.methods), options.seeds or list(study.seeds)
    if unknown := sorted(set(methods) - set(study.methods)):
        parser.error(f"--only: {', '.join(unknown)}; the study has {', '.join(study.methods)}")
    runner = Runner(study, options.quick)
    try:
        runner.run_all(methods, seeds, options.jobs)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.")
        return 130
    write_results(runner, methods, seeds)
    for line in runner.failed:
        print(f"failed: {line}")
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
