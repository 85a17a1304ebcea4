"""The table, the curves and the page of a study's results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lit_distill.files import write_text
from lit_distill.report.curves import mean_curve
from lit_distill.report.figures import draw_curves, make_figure
from lit_distill.report.metrics import metric_of
from lit_distill.report.page import render_page
from lit_distill.report.record import Report
from studies.runner import Runner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t for a two-sided 95 % interval with 1, 2, … degrees of freedom."""


def interval(values: Sequence[float]) -> str:
    """Mean ± half of the 95 % interval by Student's t; the value alone if there is one."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    half = T_95[min(len(values), len(T_95) + 1) - 2] * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3g} ± {half:.2g}"


def summarize(runner: Runner, methods: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """The values over the seeds of every metric of every method, as far as they are known."""
    study = runner.study
    found: dict[str, dict[str, list[float]]] = {}
    for name in study.with_starts(methods):
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
    said = [metric.head for metric in shown.values()]
    named = [f"{head} ({name})" if said.count(head) > 1 else head for name, head in zip(columns, said, strict=True)]
    heads = [*named, *(key.rpartition(".")[2] for key in tuned)]
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


def _reports_of(runner: Runner, methods: Sequence[str], seed: int) -> Iterator[Report]:
    """The reports of a seed. Students of starts are called as in the study, so that all seeds of a method are one column."""
    starts = runner.study.starts_of(methods)
    for name in runner.study.with_starts(methods):
        if (report := runner.report(name, seed)) is not None:
            text = json.dumps(report)
            for start in starts:
                if folder := runner.start_of(start, seed):
                    text = text.replace(json.dumps(folder)[1:-1], f"{{{start}}}")
            yield json.loads(text)


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
    if reports := [report for seed in seeds for report in _reports_of(runner, methods, seed)]:
        write_text(runner.folder / "compare.html", render_page(reports))
        print(f"Page: {runner.folder / 'compare.html'}")
