"""`tools/benchmark.py`: fair rounds, ratios and verdicts, honest counters, and a table that is stored and printed again."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from processes import exit_status

import lit_distill.objectives
from lit_distill.objectives.divergences import Divergence
from lit_distill.types import Prompts

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def part(monkeypatch):
    """A module of the tool by its name."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def bench(part, tmp_path):
    """Tiny sizes on the processor."""
    machine = importlib.import_module("gpu_checks.machine").Machine(torch.device("cpu"), tmp_path)
    return part("measure").Bench(machine, repeats=1, quick=True)


def test_ways_take_turns_after_one_warm_up_each(part) -> None:
    calls = []

    def way(name: str):
        def run() -> float:
            calls.append(name)
            return float(len(calls))

        return run

    seconds = part("measure").alternate({"ours": way("ours"), "peer": way("peer")}, repeats=2)
    assert calls == ["ours", "peer"] * 3
    assert seconds == {"ours": [3.0, 5.0], "peer": [4.0, 6.0]}


def test_a_machine_that_becomes_slower_does_not_change_the_ratio(part) -> None:
    speeds = [1.0, 4.0, 9.0]
    assert part("measure").ratio([2 * speed for speed in speeds], speeds) == 2.0
    assert part("measure").ratio([1.0, 2.0, 30.0], [1.0, 1.0, 1.0]) == 2.0


def test_a_small_goal_is_for_ours_over_the_peer_and_a_large_one_for_the_peer_over_ours(part) -> None:
    results = part("results")
    slower = results.compared("x", [1.05], [1.0], results.at_most(1.1))
    assert (slower.ratio, slower.ratio_of, slower.goal, slower.verdict) == (1.05, "ours/peer", "≤ 1.1", "met")
    faster = results.compared("x", [1.0], [1.5], results.at_least(1.6))
    assert (faster.ratio, faster.ratio_of, faster.goal, faster.verdict) == (1.5, "peer/ours", "≥ 1.6", "missed")
    assert results.compared("x", [1.0], [2.0]).verdict == "measured"


@pytest.mark.parametrize(
    ("kind", "value", "verdict"),
    [
        ("at_most", 300.0, "met"),
        ("at_most", 300.1, "missed"),
        ("at_least", 300.0, "met"),
        ("at_least", 299.0, "missed"),
        ("at_most", math.nan, "missed"),
        ("at_least", math.inf, "missed"),
    ],
)
def test_a_bound_is_within_and_what_is_no_number_misses(part, kind: str, value: float, verdict: str) -> None:
    assert getattr(part("results"), kind)(300).judge(value) == verdict


def test_a_row_that_raises_is_a_failed_line_and_the_others_go_on(part, capsys) -> None:
    results = part("results")

    def broken():
        yield results.measured("before", 1.0)
        raise RuntimeError("no such kernel\nand more")

    table = results.Results()
    table.run("P1", broken)
    table.run("P2", lambda: [results.skipped("decoding", "needs CUDA")])
    assert [(line.row, line.verdict) for line in table.lines] == [
        ("P1", "measured"),
        ("P1", "failed"),
        ("P2", "skipped"),
    ]
    assert table.failed
    assert "1 skipped, 1 failed" in table.summary(1.0)
    printed = capsys.readouterr()
    assert "RuntimeError: no such kernel |" in printed.out
    assert "and more" in printed.err


def test_a_goal_that_is_missed_is_no_failure_and_tiny_sizes_judge_none(part) -> None:
    results = part("results")
    for judged, verdict in ((True, "missed"), (False, "measured")):
        table = results.Results(judged)
        table.run("P1", lambda: [results.limited("memory", 2.0, "MB", results.at_most(1))])
        assert [line.verdict for line in table.lines] == [verdict]
        assert not table.failed


def test_the_table_of_a_stored_run_has_its_machine_and_date_and_every_line(part, monkeypatch, tmp_path, capsys) -> None:
    results = part("results")
    table = results.Results()
    table.run("P1", lambda: [results.compared("KL(p|q)", [1.0], [1.25], results.at_least(1.2), "note")])
    printed = capsys.readouterr().out.splitlines()
    about = {"date": "2030-01-02", "device": "a processor", "versions": "torch 9", "repeats": 3, "quick": False}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**about, "rows": table.records()}))
    benchmark = importlib.import_module("benchmark")
    assert benchmark.main(["--table", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2030-01-02, a processor, medians of 3 alternating rounds"
    assert lines[2] == "torch 9"
    assert lines[4:] == printed
    assert printed[-1] == r"| P1 | KL(p\|q) | 1 s | 1.25 s | 1.25 peer/ours | ≥ 1.2 | met | note |"


def test_the_work_of_both_heads_and_bodies_is_counted_whoever_runs_them(part, bench) -> None:
    models, measure = part("models"), part("measure")
    student, teacher = (models.causal_lm(bench, models.tiny_config(layers), layers) for layers in (1, 2))
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with measure.counted({"student": student, "teacher": teacher}) as counts, torch.no_grad():
        hidden = student(ids, torch.ones_like(ids))
        student.head().logits(hidden[0, :3])
        teacher.model(input_ids=ids)
        teacher.model(input_ids=ids)
    student(ids, torch.ones_like(ids))  # no longer counted
    assert counts.models == {"student": measure.Work(1, 10, 3), "teacher": measure.Work(2, 20, 20)}


def test_memory_that_is_used_for_a_moment_is_seen(part, bench) -> None:
    measure = part("measure")
    if math.isnan(part("memory").used_memory()):
        pytest.skip("this system does not say how much a process uses")
    with measure.PeakMemory(bench.machine) as peak:
        torch.ones(32 * measure.MB // 4).exp()  # two of 32 MB
    assert 50 * measure.MB < peak.extra < 120 * measure.MB


def test_every_divergence_over_the_whole_vocabulary_is_measured(part) -> None:
    shipped = [getattr(lit_distill.objectives, name) for name in lit_distill.objectives.__all__]
    expected = {kind for kind in shipped if isinstance(kind, type) and issubclass(kind, Divergence)}
    expected = {kind for kind in expected if kind.__module__ == Divergence.__module__}
    assert len(expected) > 5
    head = part("head")
    assert expected <= {kind for group in head.GROUPS for kinds in group.values() for kind in kinds}


def test_the_bare_products_are_those_of_the_chunked_loss(part, bench) -> None:
    head = part("head")
    rows = head.random_rows(bench, 10, 40, 8, 12)
    products = head.Products(rows, chunk_rows=4)
    products()
    logits = rows.hidden.detach() @ rows.weight.detach().T
    torch.testing.assert_close(products.grad_hidden, logits @ rows.weight.detach())
    torch.testing.assert_close(products.grad_weight, logits.T @ rows.hidden.detach())
    last = rows.teacher_hidden[8:] @ rows.teacher_weight.T
    torch.testing.assert_close(products.teacher_logits[:2], last)


def test_all_logits_at_once_have_the_gradients_of_the_chunked_loss(part, bench) -> None:
    head = part("head")
    rows = head.random_rows(bench, 10, 40, 8, 12)
    head.chunked(rows, (lit_distill.objectives.ForwardKL,))
    ours = rows.hidden.grad, rows.weight.grad
    head.whole(rows)
    torch.testing.assert_close((rows.hidden.grad, rows.weight.grad), ours)


def test_responses_end_at_the_lengths_that_are_given_in_every_way(part, bench) -> None:
    models, decoding = part("models"), part("decoding")
    lm = models.causal_lm(bench, models.tiny_config(), 0)
    ids = torch.arange(12).view(3, 4)
    ways = decoding.Ways(bench, lm, Prompts(ids, torch.ones_like(ids)), torch.tensor([1, 9, 5]))
    assert ways.ours() == ways.transformers() == [1, 9, 5]


def test_the_exponent_of_squares_is_two(part) -> None:
    assert part("scaling").exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


@pytest.mark.slow
def test_tiny_sizes_run_to_their_end(tmp_path) -> None:
    path = tmp_path / "results.json"
    words = ("--quick", "--device", "cpu", "--json", path, "--only", "P2")
    status, output = exit_status(TOOLS / "benchmark.py", *words, timeout=120)
    assert status == 0, output
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {row["row"] for row in rows if row["verdict"] == "measured"} == {"P2"}
    assert {row["verdict"] for row in rows} <= {"measured", "skipped"}


def test_the_table_beside_the_stored_run_is_that_of_the_run(part) -> None:
    folder = TOOLS / "benchmarks"
    table = part("results").markdown(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    assert table in (folder / "README.md").read_text(encoding="utf-8")
