"""A class that replaces another one in a config gets what was written for it, and nothing of the other one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run, tiny_config, write
from jsonargparse import _typehints

from lit_distill.cli.replaced import HOOK

# key -> a class with arguments that the class after it takes as well
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model.optimizer": (
        {"class_path": "AdamW", "init_args": {"lr": 0.3, "weight_decay": 0.5}},
        {"class_path": "SGD", "init_args": {"momentum": 0.9}},
    ),
    "model.lr_scheduler": (
        {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 7}},
        {"class_path": "WarmupConstant"},
    ),
    "model.objectives.kd": (
        {"class_path": "JensenShannon", "init_args": {"weight": 0.3, "temperature": 2.0}},
        {"class_path": "SkewForwardKL", "init_args": {"skew": 0.2}},
    ),
    "model.source": (
        {"class_path": "StudentRollouts", "init_args": {"max_new_tokens": 7, "temperature": 0.7}},
        {"class_path": "ReplayRollouts", "init_args": {"capacity": 50}},
    ),
    "data": (
        {"class_path": "ProceduralData", "init_args": {"batch_size": 3, "eval_batch_size": 5}},
        {"class_path": "InstructionData", "init_args": {"train": {"path": "my.jsonl"}}},
    ),
    "trainer.logger": (
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "a", "name": "b", "version": 3}},
        {"class_path": "CSVLogger", "init_args": {"save_dir": "c"}},
    ),
    "trainer.profiler": (
        {"class_path": "SimpleProfiler", "init_args": {"filename": "a"}},
        {"class_path": "AdvancedProfiler"},
    ),
    "trainer.callbacks": (
        [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/loss", "mode": "max", "verbose": True}}],
        [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/rouge_l"}}],
    ),
}
OTHERS = [
    name
    for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name), type) and name not in ("Optimizer", "AdamW")
]
WAYS = ("second file", "value", "class_path")


@pytest.fixture(scope="module")
def cli(pair, tmp_path_factory):
    return run("--config", write(tiny_config(pair), tmp_path_factory.mktemp("c") / "tiny.yaml"), run=False)


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def parse(cli, folder: Path, *files: dict[str, Any], more: tuple[str, ...] = ()) -> Any:
    """The config of all ``files`` and words, each file after the one before."""
    base = tiny_config((Path("student"), Path("teacher")))
    words = ["--config", str(write(base, folder / "base.yaml"))]
    for number, content in enumerate(files):
        words += ["--config", str(write(content, folder / f"{number}.yaml"))]
    return cli.parser.parse_args([*words, *more])


def asked_for(way: str, key: str, value: Any) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """A second file, or words of the command line, that say the same."""
    if way == "second file":
        return [nested(key, value)], ()
    if way == "class_path" and isinstance(value, dict):
        arguments = {k: v if isinstance(v, str) else json.dumps(v) for k, v in value.get("init_args", {}).items()}
        given = [word for name, text in arguments.items() for word in (f"--{key}.{name}", text)]
        return [], (f"--{key}.class_path", value["class_path"], *given)
    return [], (f"--{key}", json.dumps(value))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", PAIRS)
def test_what_replaces_a_class_is_what_it_would_be_alone(cli, tmp_path, key: str, way: str) -> None:
    first, second = PAIRS[key]
    files, words = asked_for(way, key, second)
    with pytest.warns(UserWarning, match="are ignored"):
        replaced = parse(cli, tmp_path, nested(key, first), *files, more=words)
    (tmp_path / "alone").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the ProceduralData in the base
        alone = parse(cli, tmp_path / "alone", nested(key, second))
    assert at(replaced, key) == at(alone, key)


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimiser_has_its_own_defaults_and_not_those_of_adamw(cli, tmp_path, name: str) -> None:
    module = cli.parser.instantiate_classes(parse(cli, tmp_path, nested("model.optimizer", name))).model
    weight = [torch.nn.Parameter(torch.zeros(2, 2))]
    assert module.optimizer_factory(weight).defaults == getattr(torch.optim, name)(weight).defaults


def test_the_default_optimiser_keeps_its_rate_where_only_another_argument_is_written(cli, tmp_path) -> None:
    written = parse(cli, tmp_path, nested("model.optimizer", {"class_path": "AdamW", "init_args": {"eps": 1e-6}}))
    assert (written.model.optimizer.init_args.lr, written.model.optimizer.init_args.eps) == (1e-4, 1e-6)


def test_an_argument_of_the_same_class_is_overridden_alone(cli, tmp_path) -> None:
    first, _ = PAIRS["model.objectives.kd"]
    config = parse(cli, tmp_path, nested("model.objectives.kd", first), more=("--model.objectives.kd.weight", "0.9"))
    assert config.model.objectives["kd"].init_args.as_dict() == {"weight": 0.9, "temperature": 2.0, "beta": 0.5}


def test_arguments_by_keyword_do_not_stay_either(cli, tmp_path) -> None:
    first = {"class_path": "AdamW", "dict_kwargs": {"mine": 3}}
    with pytest.warns(UserWarning, match="SGD replaces AdamW.*: mine: 3"):
        config = parse(cli, tmp_path, nested("model.optimizer", first), more=("--model.optimizer", "SGD"))
    assert "dict_kwargs" not in config.model.optimizer


def test_what_was_written_for_the_other_class_is_named_and_what_nobody_wrote_is_not(cli, tmp_path) -> None:
    first, _ = PAIRS["model.optimizer"]
    with pytest.warns(UserWarning, match="SGD replaces AdamW") as said:
        parse(cli, tmp_path, nested("model.optimizer", first), more=("--model.optimizer", "SGD"))
    assert [str(warning.message) for warning in said] == [
        "SGD replaces AdamW, so these arguments of AdamW are ignored: lr: 0.3, weight_decay: 0.5."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(cli, tmp_path, nested("model.optimizer", "SGD"))


def test_jsonargparse_is_left_as_it_was(cli, tmp_path) -> None:
    before = getattr(_typehints, HOOK)
    parse(cli, tmp_path, nested("model.optimizer", "SGD"))
    with pytest.raises(SystemExit):
        parse(cli, tmp_path, nested("model.optimizer", "Nothing"))
    assert getattr(_typehints, HOOK) is before
    assert before.__module__ == _typehints.__name__
