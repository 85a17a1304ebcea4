"""Runs become columns: seeds together, all else apart."""

from __future__ import annotations

import statistics

import pytest
from reports import report_of

from lit_distill.report.columns import columns_of, split_model
from lit_distill.report.metrics import KNOWN, metric_of, number
from lit_distill.report.page import render_page, text_card
from lit_distill.report.table import rows_of
from lit_distill.validation.arguments import check_names


@pytest.mark.parametrize("base", [name for name in KNOWN if name not in ("forward_kl", "reverse_kl", "reward")])
def test_no_objective_is_called_as_a_metric(base) -> None:
    name = f"{base}_4" if "{}" in KNOWN[base].label else base
    with pytest.raises(ValueError, match=f"^objectives: '{name}' is the name of a metric"):
        check_names([name], [])


def test_seeds_of_one_configuration_are_a_column_with_mean_and_deviation() -> None:
    values = [3.0, 3.5, 4.75]
    columns, notes = columns_of(
        [report_of(seed=seed, perplexity=value) for seed, value in zip((1, 2, 5), values, strict=True)]
    )
    assert [column.model for column in columns] == ["teacher", "student"]
    assert not notes
    teacher, student = columns
    assert student.metrics["perplexity"] == (
        pytest.approx(statistics.mean(values)),
        pytest.approx(statistics.stdev(values)),
        3,
    )
    assert student.note == "seeds 1, 2, 5"
    assert teacher.metrics["perplexity"] == (2.0, None, 1)
    assert "3.750 ± 0.901" in text_card(
        [report_of(seed=s, perplexity=v) for s, v in zip((1, 2, 5), values, strict=True)]
    )


def test_without_training_seeds_the_deviation_is_that_over_the_seeds_of_the_draws() -> None:
    before, after = report_of(trained=False), report_of()
    for report in (before, after):
        report["metrics"] |= {"rouge_l_std": 1.5, "teacher_rouge_l": 70.0, "teacher_rouge_l_std": 0.5}
    teacher, *students = columns_of([before, after])[0]
    assert [column.metrics["rouge_l"] for column in students] == [(50.0, 1.5, 1)] * 2
    assert teacher.metrics["rouge_l"] == (70.0, 0.5, 1)


@pytest.mark.slow
def test_runs_that_differ_in_a_setting_are_columns_of_their_own() -> None:
    reports = [
        report_of(seed=seed, training_config={"model": {"lr": lr}}) for seed, lr in ((1, 0.1), (2, 0.1), (3, 0.2))
    ]
    students = [column for column in columns_of(reports)[0] if column.model == "student"]
    assert sorted(len(column.reports) for column in students) == [1, 2]
    assert len({column.label for column in students}) == 2
    page = render_page(reports)
    assert "model.lr" in page
    assert "settings differ" in page


def test_students_stand_in_the_order_in_which_they_were_given() -> None:
    reports = [report_of("late"), report_of("early")]
    reports[0]["run"]["date"], reports[1]["run"]["date"] = "2026-01-02T00:00:00", "2026-01-01T00:00:00"
    assert [column.label for column in columns_of(reports)[0] if column.model == "student"] == [
        "late, step 100",
        "early, step 100",
    ]


def test_the_same_run_tested_twice_counts_once_and_is_told() -> None:
    old, new = report_of(perplexity=9.0), report_of(perplexity=3.0)
    old["run"] |= {"date": "2020-01-01T00:00:00", "folder": "runs/kd/version_0"}
    columns, notes = columns_of([new, old])
    assert columns[-1].metrics["perplexity"].mean == 3.0
    assert len(notes) == 1
    assert "runs/kd/version_0" in notes[0]


def test_checkpoints_of_one_training_are_columns_of_their_own() -> None:
    early, late = report_of(perplexity=4.0), report_of(perplexity=3.0)
    early["checkpoint"]["step"] = 50
    labels = [column.label for column in columns_of([late, early])[0]]
    assert labels == ["teacher", "student, step 50", "student, step 100"]


@pytest.mark.slow
def test_tests_on_other_data_are_not_mixed_and_are_warned_of() -> None:
    here, there = report_of(seed=1), report_of(seed=2, config={"data": {"class_path": "Other"}})
    there["metrics"]["teacher_perplexity"] = 2.5
    columns, _ = columns_of([here, there])
    assert [column.model for column in columns] == ["teacher", "teacher", "student", "student"]
    assert "Not all of these runs were tested alike: data.class_path differ" in render_page([here, there])


def test_a_teacher_is_one_column_as_long_as_its_tests_agree() -> None:
    before, after = report_of(trained=False), report_of(config={"exposure_bias": {"max_prompts": 50}})
    after["metrics"] |= {"teacher_perplexity": 2.00001, "sentiment/teacher_ece": 0.2}  # other batches, one more task
    (teacher,) = (column for column in columns_of([before, after])[0] if column.model == "teacher")
    assert teacher.label == "teacher"
    assert teacher.metrics["sentiment/ece"].mean == 0.2
    assert teacher.metrics["perplexity"] == (2.00001, None, 1)


def test_a_teacher_whose_figures_differ_is_several_columns_that_say_why() -> None:
    reports = [
        report_of(config={"generation": {"temperature": temperature, "max_prompts": prompts}})
        for temperature, prompts in ((0.0, 9), (0.0, 5), (1.0, 9))
    ]
    for report, rouge in zip(reports, (80.0, 80.0, 70.0), strict=True):
        report["metrics"]["teacher_rouge_l"] = rouge
    labels = [column.label for column in columns_of(reports)[0]]
    assert labels[:2] == ["teacher (generation.temperature 0.0)", "teacher (generation.temperature 1.0)"]
    assert labels[2] == "student, step 100 (generation.temperature 0.0, generation.max_prompts 9)"
    assert len(set(labels)) == len(labels) == 5


def test_a_teacher_in_another_precision_is_not_averaged_with_itself() -> None:
    reports = [report_of(config={"model": {"teacher": {"dtype": dtype}}}) for dtype in ("float32", "bfloat16")]
    reports[1]["metrics"]["teacher_perplexity"] = 2.1
    teachers = [column for column in columns_of(reports)[0] if column.model == "teacher"]
    assert [column.metrics["perplexity"].mean for column in teachers] == [2.0, 2.1]
    assert [column.label for column in teachers] == [
        "teacher (model.teacher.dtype float32)",
        "teacher (model.teacher.dtype bfloat16)",
    ]


def test_the_best_student_is_marked_in_the_direction_of_the_figure() -> None:
    before, after = report_of(trained=False, perplexity=4.0), report_of(perplexity=3.0)
    before["metrics"] |= {"rouge_l": 60.0, "exact_match": 1.0, "response_length": 9.0}
    after["metrics"] |= {"rouge_l": 50.0, "exact_match": 1.001, "response_length": 8.0}
    columns, _ = columns_of([after, before])
    assert [column.label for column in columns] == ["teacher", "student, before training", "student, step 100"]
    best = {row.name: row.best for row in rows_of(columns)}
    assert best["perplexity"] == [False, False, True]  # the teacher's 2.0 does not compete
    assert best["rouge_l"] == [False, True, False]
    assert best["exact_match"] == best["response_length"] == [False, False, False]  # equal as shown; no direction


@pytest.mark.parametrize(
    ("name", "model", "plain"),
    [
        ("perplexity", "student", "perplexity"),
        ("teacher_rouge_l", "teacher", "rouge_l"),
        ("task/teacher_ece", "teacher", "task/ece"),
        ("teacher_rouge_l/under_4_words", "teacher", "rouge_l/under_4_words"),
    ],
)
def test_metrics_are_sorted_by_model(name, model, plain) -> None:
    assert split_model(name) == (model, plain)


def test_figures_have_units_and_sensible_digits() -> None:
    assert metric_of("distinct_4").head == "distinct-4, % ↑"
    assert metric_of("ex_acc_err_128").head == "ExAccErr at 128 tokens, % ↓"
    assert metric_of("sst2/ece").group == "Classification: sst2"
    assert number(-0.0001, 2) == "0.00"
    assert number(-1234.5, 1) == "\N{MINUS SIGN}1,234.5"
    shown = {}
    for value in (0.000412, 0.0512, 3.14159, 12345.6):
        (row,) = (row for row in rows_of(columns_of([report_of(perplexity=value)])[0]) if row.name == "perplexity")
        shown[value] = row.cells[1]
    assert shown[3.14159] == "3.142"
    assert shown[12345.6] == "12,346"
    assert shown[0.0512] == "0.051"
