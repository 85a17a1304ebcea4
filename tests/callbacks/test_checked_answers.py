"""A checker of the project or of the user's own, from YAML to the metrics, the report and the monitor of a run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import main, run, tiny_config, write

from lit_distill.callbacks import GenerationEvaluator, OnPolicyEvaluator
from lit_distill.evaluation.checkers import Checker, ExactMatch, NumberMatch
from lit_distill.evaluation.text_metrics import GenerationMetrics

README = Path(__file__).parents[2] / "callbacks" / "README.md"
QUIET = ("--trainer.logger", "false")


class Divisible(Checker):
    """A rule that a random model sometimes follows, of the number of characters."""

    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, response: str, references) -> float:
        return float(len(response) % self.by == 0)


def callback(cli, kind: type):
    return next(c for c in cli.trainer.callbacks if isinstance(c, kind))


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A test with two seeds, a teacher and buckets."""
    folder = tmp_path_factory.mktemp("test")
    checker = {"class_path": "test_checked_answers.Divisible", "init_args": {"by": 2}}
    config = tiny_config(pair) | {"on_policy": {"max_prompts": 3, "max_new_tokens": 4}}
    config["data"]["init_args"]["num_test"] = 9
    config["generation"] |= {"temperature": 1.0, "max_new_tokens": 8, "reference_lengths": [2], "checker": checker}
    config["trainer"] |= {"default_root_dir": str(folder), "logger": False}
    path = write(config, folder / "x.yaml")
    return run("test", "--config", path, "--generation.seeds", "[1, 2]"), path


def test_a_test_logs_the_accuracy_like_exact_match(finished) -> None:
    cli, path = finished
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    checked = {name for name in metrics if "answer_accuracy" in name}
    assert checked == {name.replace("exact_match", "answer_accuracy") for name in metrics if "exact_match" in name}
    for who in ("", "teacher_"):
        single = [
            run("test", "--config", path, "--generation.seed", seed).trainer.callback_metrics[
                f"test/{who}answer_accuracy"
            ]
            for seed in (1, 2)
        ]
        assert metrics[f"test/{who}answer_accuracy"] == pytest.approx(float(sum(single)) / 2, abs=1e-4)
        assert f"test/{who}answer_accuracy_std" in metrics
        assert 0 < metrics[f"test/{who}answer_accuracy"] < 100
    section = callback(cli, GenerationEvaluator).report()["generation"][0]
    json.dumps(section, allow_nan=False)
    assert section["scores"]["answer_accuracy"]["mean"] == pytest.approx(metrics["test/answer_accuracy"])
    sizes = [(bucket["count"], bucket["scores"]["answer_accuracy"]) for bucket in section["buckets"]]
    assert sum(count * score for count, score in sizes) / 9 == pytest.approx(metrics["test/answer_accuracy"], rel=1e-4)


def test_without_a_checker_nothing_changes(finished) -> None:
    with_one, path = finished
    plain = run("test", "--config", path, "--generation.seeds", "[1, 2]", "--generation.checker", "null")
    logged, before = plain.trainer.callback_metrics, with_one.trainer.callback_metrics
    assert set(before) - set(logged) == {name for name in before if "answer_accuracy" in name}
    assert {name: float(logged[name]) for name in logged} == {name: float(before[name]) for name in logged}
    assert "answer_accuracy" not in callback(plain, GenerationEvaluator).report()["generation"][0]["scores"]


def test_the_samples_of_the_responses_are_logged_beside_it(finished) -> None:
    metrics = finished[0].trainer.callback_metrics
    assert {"test/pass_at_1", "test/pass_at_8", "test/mean_at_8", "test/top_k_overlap"} <= set(metrics)


def test_the_names_of_a_validation_have_the_accuracy_only_with_a_checker() -> None:
    trainer = SimpleNamespace(datamodule=None)
    names = [set(GenerationEvaluator(checker=checker).metric_names(trainer, None)) for checker in (None, ExactMatch())]  # type: ignore[arg-type]
    assert names[1] - names[0] == {"val/answer_accuracy"}


def test_the_accuracy_is_the_mean_score_and_a_prompt_without_references_does_not_count() -> None:
    metric = GenerationMetrics([2], NumberMatch())
    metric.update(["so 7", "8", "9", "no"], [["7"], ["1 = 7"], [], ["4 5", "7"]], [1] * 4, [True] * 4)
    scores = metric.compute()
    assert scores["answer_accuracy"].item() == pytest.approx(100 / 3)
    assert scores["answer_accuracy/under_2_words"].item() == 100
    assert scores["answer_accuracy/over_1_words"].item() == 0


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The folder that one works in, with the checker of the README in it."""
    monkeypatch.chdir(tmp_path)
    # As in a console script: the folder one works in is not on the path before `main` puts it there.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = (text for text in examples if "(Checker)" in text)
    (tmp_path / "my_checkers.py").write_text(example, encoding="utf-8")
    yield tmp_path
    monkeypatch.delitem(sys.modules, "my_checkers", raising=False)


def test_the_readmes_checker_works_and_its_metrics_can_be_monitored(pair, own_folder) -> None:
    config = tiny_config(pair) | {"export": {"enabled": False}}
    config["generation"] |= {"max_prompts": 4, "checker": "my_checkers.LastWord"}
    config["on_policy"] = {"max_prompts": 2, "max_new_tokens": 4, "num_responses": 2, "checker": "my_checkers.LastWord"}
    config["checkpoint"] = {"monitor": "val/pass_at_2", "mode": "max"}
    main("fit", "--config", write(config, own_folder / "own.yaml"))
    (log,) = (own_folder / "runs").rglob("metrics.csv")
    head = log.read_text().splitlines()[0].split(",")
    assert {"val/answer_accuracy", "val/pass_at_1", "val/pass_at_2", "val/mean_at_2"} <= set(head)
    assert list((own_folder / "runs").rglob("step-*.ckpt"))


def test_a_short_name_and_its_arguments_are_read_from_yaml(pair, tmp_path) -> None:
    config = tiny_config(pair)
    config["on_policy"] = {"checker": {"class_path": "ChoiceMatch", "init_args": {"choices": "ABC"}}}
    config["generation"]["checker"] = "NumberMatch"
    cli = run("validate", "--config", write(config, tmp_path / "x.yaml"), *QUIET, "--generation.max_prompts", 0)
    assert callback(cli, OnPolicyEvaluator).checker.choices == "ABC"
    assert callback(cli, GenerationEvaluator).checker.tolerance == 0


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        ("NumberMatc", r"There is no class 'NumberMatc'\.\nDid you mean 'NumberMatch'\?"),
        (
            {"class_path": "NumberMatch", "init_args": {"tolerence": 1}},
            r"'tolerence' is not accepted\nDid you mean 'tolerance'",
        ),
        (
            {"class_path": "NumberMatch", "init_args": {"tolerance": -1}},
            r"generation\.checker\.init_args\.tolerance: expected",
        ),
        ("NumberMatch", r"generation\.checker: NumberMatch: the reference '.*' has no number"),
    ],
)
def test_what_is_wrong_has_its_key(pair, tmp_path, capsys, checker, message: str) -> None:
    config = tiny_config(pair)
    config["data"]["init_args"]["kinds"] = ["repeat"]
    config["generation"]["checker"] = checker
    with pytest.raises(SystemExit) as ended:
        main("validate", "--config", write(config, tmp_path / "x.yaml"), *QUIET)
    said = capsys.readouterr().err if ended.value.code == 2 else str(ended.value)
    assert re.search(message, said), said
