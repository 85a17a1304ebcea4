"""Runs a study: several methods with several seeds, each as its own `lit-distill fit` and `test`, then one table and one page.

Run: python tools/study.py tools/studies/on_policy.yaml              (hours; finished runs are not repeated)
     python tools/study.py tools/studies/results/methods.json          (its table again)
     python tools/study.py STUDY --only minillm top_k --seeds 1 --quick     (two steps of each: whether everything runs)

A study is a YAML file:

    folder: runs/studies/NAME         runs, table.md, results.json, curves.png and compare.html
    seeds: [1, 2, 3]                  seed_everything of each run
    configs: [FILE, ...]              configs of every run; relative to the checkout
    arguments: {KEY: VALUE, ...}      arguments of every run, such as trainer.max_steps: 500
    starts:                           optional: runs that come first, whose students others may begin with
      NAME: {configs: ..., arguments: ...}
    tune:                             optional: every combination is tried once, and each method is run with its own best
      arguments: {KEY: [VALUE, ...], ...}
      seed: 0                         of these trials; no seed of the study
      metric: val/exact_match         its best value in the training decides; the test data are not looked at
      mode: max                       or min
    methods:
      NAME: {configs: ..., arguments: ...}          added to those of every run; "{NAME}" as a path is that start's student
        tune: {KEY: [VALUE, ...]}                   other values to try for this method, in place of tune.arguments of the same key;
                                                    or NAME: what that method has chosen
    test: {arguments: ...}            added in the test alone
    checkpoint: best                  or last: which checkpoint is tested, and taken of a start
    metrics: [exact_match, ...]       of the test, the columns of the table
    training_metrics: [train/..., ...]   the last value of each in the training (metrics.csv), further columns
    curves: [val/..., ...]            metrics of the training to draw into curves.png, the mean over the seeds
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from studies.plan import Study
from studies.runner import Runner
from studies.tables import stored_table, write_results

STOPPED = "Stopped. The same command goes on from here."


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
    parser.add_argument("--table", action="store_true", help="no run: the table of those that are finished")
    options = parser.parse_args(arguments)
    if options.study.suffix == ".json":
        print(stored_table(options.study))
        return 0
    try:
        study = Study.read(options.study)
    except ValueError as error:
        parser.error(str(error))
    methods = list(dict.fromkeys(options.only or study.methods))
    seeds = list(dict.fromkeys(options.seeds or study.seeds))
    if unknown := sorted(set(methods) - set(study.methods)):
        parser.error(f"--only: {', '.join(unknown)}; the study has {', '.join(study.methods)}")
    if study.tune is not None and study.tune.seed in seeds:
        parser.error(f"--seeds: {study.tune.seed} is that of the study's tune. Give another one.")
    runner = Runner(study, options.quick)
    try:
        if not options.table:
            runner.run_all(methods, seeds, options.jobs)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(STOPPED)
        return 130
    everything = list(study.methods), list(dict.fromkeys([*study.seeds, *seeds]))
    runner.read_all(*everything)
    write_results(runner, *everything)
    for line in runner.failed:
        print(f"failed: {line}")
    return 1 if runner.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    sys.exit(main())
