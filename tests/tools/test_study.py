"""A study: its YAML, the runs that it starts, and the table of their results."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from command_line import run

TOOLS = Path(__file__).parents[2] / "tools"
STUDIES = sorted((TOOLS / "studies").glob("*.yaml"))


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("study")


@pytest.fixture
def part(monkeypatch):
    """A part of the tool by its name."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"studies.{name}")


def written(place: Path, **values) -> Path:
    file = place / "study.yaml"
    file.write_text(yaml.safe_dump({"folder": str(place / "runs"), "methods": {"a": {}, "b": {}}, **values}))
    return file


def report(folder: Path, student: str, **metrics: float) -> None:
    from lit_distill.report.record import make_report, write_report

    folder.mkdir(parents=True)
    write_report(make_report(folder, metrics, {}, student), folder)


@pytest.fixture
def calls(part, monkeypatch):
    """The commands of a study, none of which runs; a test of a run leaves a report."""
    found = []

    def call(runner, log, command, words):
        given = dict(zip(words[::2], words[1::2], strict=True))
        found.append((command, given))
        folder = Path(given["--trainer.default_root_dir"]) / given["--run_name"]
        if command == "test":
            student = given.get("--model.student", "lit_distill/assets/student")
            report(folder / "version_1", student, rouge_l=10.0 * int(given["--seed_everything"]))
        elif given["--run_name"] in ("small", "large"):
            (folder / "version_0" / "export" / "best").mkdir(parents=True)
        return given["--run_name"] != "bad" or command != "fit"

    monkeypatch.setattr(part("runner").Runner, "_call", call)
    return found


def test_every_method_and_seed_is_trained_and_tested_once(tool, calls, tmp_path, capsys) -> None:
    file = written(tmp_path, seeds=[1, 3], metrics=["rouge_l"], arguments={"trainer.max_steps": 7, "model.x": {"k": 1}})
    assert tool.main([str(file)]) == 0
    done = sorted((command, given["--run_name"], given["--seed_everything"]) for command, given in calls)
    assert done == [(command, name, seed) for command in ("fit", "test") for name in "ab" for seed in "13"]
    assert all(given["--trainer.max_steps"] == "7" and given["--model.x"] == '{"k": 1}' for _, given in calls)
    assert {given["--ckpt_path"] for command, given in calls if command == "test"} == {"best"}
    table = (tmp_path / "runs" / "table.md").read_text()
    assert "| a | 20 ± 1.3e+02 |" in table  # 10 and 30: s = 14.14, t = 12.71
    assert table in capsys.readouterr().out
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert results["results"]["b"]["rouge_l"] == [10.0, 30.0]
    assert (tmp_path / "runs" / "compare.html").is_file()
    calls.clear()
    assert tool.main([str(file)]) == 0
    assert not calls
    changed = written(tmp_path, seeds=[1], metrics=["rouge_l", "rogue_l"], arguments={"trainer.max_steps": 8})
    assert tool.main([str(changed)]) == 1
    said = capsys.readouterr().out
    assert "failed: a, seed 1: was run with other settings; to run it again, remove" in said
    assert not said.rpartition("| a |")[2].splitlines()[0].strip(" |")  # the old value is in no table
    assert "rogue_l: no run has it." in said


def test_a_method_begins_with_the_student_of_the_start_that_it_names(tool, calls, tmp_path, capsys) -> None:
    names = ("small", "large", "unused", "bad")
    methods = {
        f"from_{name}": {"arguments": {"model.student": {"path": f"{{{name}}}"}}} for name in names if name != "unused"
    }
    methods["other"] = {"arguments": {"data.template": "{prompt}"}}
    file = written(tmp_path, seeds=[2], starts={name: {"arguments": {"lr": 1}} for name in names}, methods=methods)
    assert tool.main([str(file)]) == 1
    found = {words["--run_name"]: words for command, words in calls if command == "fit"}
    assert found.keys() == {"small", "large", "bad", "from_small", "from_large", "other"}
    for name in ("small", "large"):
        folder = tmp_path / "runs" / "seed_2" / name / "version_0" / "export" / "best"
        assert json.loads(found[f"from_{name}"]["--model.student"]) == {"path": str(folder)}
    assert found["other"]["--data.template"] == "{prompt}"
    page = (tmp_path / "runs" / "compare.html").read_text()
    assert "{small}" in page
    assert str(tmp_path / "runs" / "seed_2" / "small" / "version_0" / "export") not in page
    assert "from_bad, seed 2: bad, with which it begins, has exported no student" in capsys.readouterr().out


def test_what_a_start_or_a_trial_was_made_with_counts_for_what_follows_from_it(tool, calls, tmp_path, capsys) -> None:
    methods = {"a": {"arguments": {"model.student.path": "{small}"}}, "b": {}}
    given = {"seeds": [1], "metrics": ["rouge_l"], "methods": methods}
    assert tool.main([str(written(tmp_path, starts={"small": {"arguments": {"lr": 1}}}, **given))]) == 0
    capsys.readouterr()
    assert tool.main([str(written(tmp_path, starts={"small": {"arguments": {"lr": 2}}}, **given)), "--table"]) == 1
    said = capsys.readouterr().out
    assert all(f"failed: {name}, seed 1: was run with other settings" in said for name in ("small", "a"))
    assert "| b | 10 |" in said
    assert "failed: b" not in said


def test_a_part_of_a_study_keeps_the_rest_in_its_table(tool, calls, tmp_path, capsys) -> None:
    file = str(written(tmp_path, seeds=[1, 3], metrics=["rouge_l"]))
    assert tool.main([file]) == 0
    whole = (tmp_path / "runs" / "results.json").read_text()
    assert tool.main([file, "--only", "a", "a", "--seeds", "1", "1"]) == 0
    assert (tmp_path / "runs" / "results.json").read_text() == whole


def test_the_table_of_what_is_finished_runs_nothing(tool, calls, tmp_path, capsys) -> None:
    given = {"metrics": ["rouge_l"], "tune": {"arguments": {"lr": [1]}, "metric": "val/m", "seed": 9}}
    assert tool.main([str(written(tmp_path, seeds=[1], metrics=["rouge_l"])), "--only", "a"]) == 0
    calls.clear()
    assert tool.main([str(written(tmp_path, seeds=[1, 2], metrics=["rouge_l"])), "--table"]) == 0
    assert not calls
    said = capsys.readouterr().out
    assert "| a | 10 |" in said
    assert re.search(r"\| b \| +\|", said)
    assert tool.main([str(written(tmp_path, arguments={"lr": 1}, **given)), "--table"]) == 1
    assert "a, seed 1: was run with other settings" in capsys.readouterr().out
    assert not calls


@pytest.mark.parametrize(("mode", "best"), [("max", {"a": "2", "b": "5"}), ("min", {"a": "3", "b": "5"})])
def test_every_method_is_run_with_the_settings_that_are_best_on_validation(
    tool, part, calls, tmp_path, monkeypatch, mode, best
) -> None:
    runner = part("runner").Runner
    answer = runner._call

    def call(runner, log, command, words):
        given = dict(zip(words[::2], words[1::2], strict=True))
        if command == "fit" and given["--seed_everything"] == "9":  # the best of 1, 2 and 3 is reached on the way
            folder = Path(given["--trainer.default_root_dir"]) / given["--run_name"] / "version_0"
            folder.mkdir(parents=True)
            highest = {"1": 5, "2": 9, "3": 3}.get(given["--lr"], 1)
            (folder / "metrics.csv").write_text(f"step,val/m\n1,4\n2,{highest}\n3,4.5\n")
        return answer(runner, log, command, words)

    monkeypatch.setattr(runner, "_call", call)
    tune = {"arguments": {"lr": [1, 2, 3]}, "metric": "val/m", "mode": mode, "seed": 9}
    methods = {"a": {}, "b": {"tune": {"lr": [5]}}, "c": {"tune": "a"}}
    file = written(tmp_path, seeds=[1], metrics=["rouge_l"], methods=methods, tune=tune)
    assert tool.main([str(file)]) == 0
    tried = [(given["--run_name"], given["--lr"]) for _, given in calls if given["--seed_everything"] == "9"]
    assert sorted(tried) == [("a.0", "1"), ("a.1", "2"), ("a.2", "3"), ("b.0", "5")]
    chosen = {given["--run_name"]: given["--lr"] for _, given in calls if given["--seed_everything"] == "1"}
    assert chosen == {**best, "c": best["a"]}
    assert json.loads((tmp_path / "runs" / "results.json").read_text())["tuned"]["a"] == {"lr": int(best["a"])}
    row = (tmp_path / "runs" / "table.md").read_text().splitlines()[2]
    assert re.fullmatch(rf"\| a \| 10 \| \S+ \| {best['a']} \|", row)
    calls.clear()
    assert tool.main([str(file)]) == 0
    assert not calls


def test_a_metric_that_is_not_logged_is_found_after_the_first_trial(tool, calls, tmp_path, capsys) -> None:
    tune = {"arguments": {"lr": [1, 2, 3]}, "metric": "val/m", "seed": 9}
    with pytest.raises(SystemExit):
        tool.main([str(written(tmp_path, seeds=[1], tune=tune))])
    assert "tune.metric: a.0 has trained, but val/m was not logged" in capsys.readouterr().err
    assert [given["--run_name"] for _, given in calls] == ["a.0"]


def test_an_interruption_says_how_to_go_on(tool, part, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(part("runner").Runner, "run_all", interrupted)
    assert tool.main([str(written(tmp_path))]) == 130
    assert "The same command goes on" in capsys.readouterr().out


def test_a_signal_ends_the_runs_and_begins_no_other(part, tmp_path) -> None:
    runner, ended = part("runner").Runner(part("plan").Study.read(written(tmp_path, seeds=[1]))), []

    class Process:
        def terminate(self) -> None:
            ended.append(self)

    under_way = Process()

    def run(*_) -> None:
        runner._processes.add(under_way)
        sys.exit("SIGTERM")

    runner.run = run
    with pytest.raises(SystemExit):
        runner.run_all(["a", "b"], [1], jobs=1)
    assert ended == [under_way]
    assert not runner._call(tmp_path / "log", "fit", [])  # nothing begins
    assert runner.failed == []


def test_a_column_that_the_test_does_not_have_is_told_at_once(tool, calls, tmp_path, capsys) -> None:
    tool.main([str(written(tmp_path, seeds=[1, 2], metrics=["rouge_l", "exact_mach"])), "--jobs", "1"])
    said = capsys.readouterr().out
    assert said.count("metrics: the test of a has no exact_mach; it has rouge_l.") == 1
    assert said.index("metrics: the test") < said.index("| a |")


def test_a_run_that_fails_does_not_end_the_others(tool, calls, tmp_path, capsys) -> None:
    file = written(tmp_path, seeds=[1], methods={"bad": {}, "good": {}})
    assert tool.main([str(file), "--jobs", "1"]) == 1
    assert [given["--run_name"] for command, given in calls if command == "test"] == ["good"]
    assert "failed: bad, seed 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"methods": None}, "methods: expected methods by name"),
        ({"metrcs": ["a"]}, "the study: expected keys out of folder, methods, seeds"),
        ({"methods": {"a": {"config": "x"}}}, "methods.a: expected keys out of configs, arguments, tune; got config"),
        ({"starts": {"a": {}}}, "methods: a is one of starts too"),
        ({"starts": []}, "starts: expected starts by name"),
        ({"starts": {"my-start": {}}}, "starts.my-start: a name has letters, digits and underscores only"),
        ({"folder": None}, "folder: expected a path, got None"),
        ({"arguments": ["a"]}, "arguments: expected a mapping, got ['a']"),
        ({"methods": {"a": {"configs": "x.yaml"}}}, "methods.a.configs: expected a list, got 'x.yaml'"),
        ({"metrics": "rouge_l"}, "metrics: expected a list, got 'rouge_l'"),
        ({"seeds": ["one"]}, "seeds: expected a list of different numbers"),
        ({"arguments": {"model.student.path": "{a}"}}, "arguments: a start cannot begin with itself"),
        ({"configs": ["configs/quickstrat.yaml"]}, "configs: there is no file"),
        ({"seeds": 3}, "seeds: expected a list, got 3"),
        ({"seeds": [1, 1]}, "seeds: expected a list of different numbers"),
        ({"tune": {"arguments": {"lr": [1]}, "metric": "m", "mode": "maximum"}}, "tune.mode: expected max or min"),
        (
            {"tune": {"arguments": {"lr": 1e-3}, "metric": "m"}},
            "tune.arguments: expected a list of values for each key",
        ),
        ({"methods": {"a": {"tune": {"lr": [1]}}}}, "methods.a.tune: there is no tune for all methods"),
        ({"tune": {"arguments": {"lr": [1, 2]}}}, "of which arguments and metric must be there; got arguments"),
        (
            {"methods": {"a": {"tune": "b"}}, "tune": {"arguments": {}, "metric": "m"}},
            "a.tune: b is no method that is tuned",
        ),
        ({"tune": {"arguments": {}, "metric": "m", "seed": 1}}, "tune.seed: 1 is one of seeds"),
        (
            {"methods": {"a": {"arguments": {"seed_everything": 9}}}},
            "methods.a.arguments: seed_everything is set by the study",
        ),
        ({"checkpoint": "newest"}, "checkpoint: expected best or last, got 'newest'"),
        (
            {"methods": {"a": {"arguments": {"x": {"path": "{b}"}}}}, "starts": {"c": {}}},
            "methods.a.arguments: {b} is none of starts; there are c",
        ),
    ],
)
def test_a_wrong_study_is_refused(tool, tmp_path, values, words, capsys) -> None:
    with pytest.raises(SystemExit):
        tool.main([str(written(tmp_path, **values))])
    assert words in capsys.readouterr().err


def test_a_method_that_the_study_does_not_have_is_refused(tool, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        tool.main([str(written(tmp_path)), "--only", "c"])
    assert "--only: c; the study has a, b" in capsys.readouterr().err


@pytest.mark.parametrize(("values", "expected"), [([2.5], "2.5"), ([1.0, 2.0, 3.0], "2 ± 2.5"), ([1.0, 1.0], "1 ± 0")])
def test_intervals_are_those_of_students_t(part, values, expected) -> None:
    assert part("tables").interval(values) == expected


@pytest.mark.slow
def test_a_command_that_fails_says_so_in_its_log(part, tmp_path) -> None:
    runner, log = part("runner").Runner(part("plan").Study(tmp_path, {})), tmp_path / "seed_1" / "a.log"
    assert not runner._call(log, "fit", ["--config", "no-such-file.yaml"])
    assert "lit_distill fit --config no-such-file.yaml" in log.read_text()
    assert "there is no file no-such-file.yaml" in log.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* replaces .*, so these arguments")
def test_every_method_of_every_shipped_study_is_a_config(part, monkeypatch) -> None:
    monkeypatch.chdir(TOOLS.parent)
    monkeypatch.syspath_prepend(TOOLS.parent)
    parser = run("--config", "configs/quickstart.yaml", run=False).parser
    objectives = set()
    for path in STUDIES:
        if "methods" not in yaml.safe_load(path.read_text()):
            continue
        study = part("plan").Study.read(path)
        for name, method in {**study.starts, **study.methods}.items():
            files = [word for file in (*study.configs, *method.configs) for word in ("--config", file)]
            given = {**study.arguments, **method.arguments, **study.test.arguments}
            words = part("runner").words_of(given, dict.fromkeys(study.starts, "start"))
            try:
                parsed = parser.parse_args([*files, *words])
            except SystemExit as stop:
                raise AssertionError(f"{path.stem}: {name}") from stop
            objectives |= {str(objective.class_path) for objective in parsed.model.objectives.values()}
    assert any(objective.endswith("TopKReverseKL") for objective in objectives)


def test_the_tables_of_stored_results_stand_in_the_readme(tool, capsys) -> None:
    text = (TOOLS / "studies" / "README.md").read_text(encoding="utf-8")
    stored = sorted((TOOLS / "studies" / "results").glob("*.json"))
    assert len(stored) > 3
    for file in stored:
        assert tool.main([str(file)]) == 0
        assert capsys.readouterr().out.strip() in text, file.name
