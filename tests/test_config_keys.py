"""The YAML key of an error: constructors and later checks name the argument, the command line says where it stands."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lit_distill.cli.errors import ConfigError, ConfigKeys
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.sources import StudentRollouts
from lit_distill.types import ArgumentError, arguments_of


@dataclass
class Limits:
    low: int
    high: int


CONFIG = {
    "model": {
        "objectives": {
            "first": {
                "class_path": "lit_distill.objectives.ForwardKL",
                "init_args": {"weight": 1.0, "temperature": 1.0},
            },
            "second": {"class_path": "ForwardKL", "init_args": {"weight": 1.0, "temperature": -2.0}},
        },
        "source": {"class_path": "lit_distill.sources.StudentRollouts", "init_args": {"seed": 1}},
        "limits": {"low": 1, "high": 3},
    },
    "callbacks": [{"class_path": "other.NextToken", "init_args": {}}],
}


@pytest.fixture
def keys() -> ConfigKeys:
    return ConfigKeys(CONFIG, {str: "of.its.own"})


def message(keys: ConfigKeys, raised: Exception) -> str:
    with pytest.raises(ConfigError) as error, keys.attached():
        raise raised
    return str(error.value)


def test_of_two_objects_of_a_class_the_one_with_these_arguments_is_named(keys) -> None:
    with pytest.raises(ConfigError, match=r"^model\.objectives\.second\.init_args\.temperature: expected a number > 0"):
        keys.build(ForwardKL, (), {"weight": 1.0, "temperature": -2.0})


def test_null_is_refused_where_none_is_no_value(keys) -> None:
    message = r"^model\.objectives\.first\.init_args\.temperature: expected float, got null\. .* default, 1\.0\.$"
    with pytest.raises(ConfigError, match=message):
        keys.build(ForwardKL, (), {"weight": 1.0, "temperature": None})
    assert keys.build(StudentRollouts, (), {"seed": None}).seed >= 0


def test_an_object_is_known_after_it_was_built(keys) -> None:
    source = keys.build(StudentRollouts, (), {"seed": 1})
    assert message(keys, ArgumentError(source, "seed: wrong")) == "model.source.init_args.seed: wrong"
    said = message(keys, ArgumentError(source, "StudentRollouts has no end."))
    assert said == "model.source: StudentRollouts has no end."


def test_a_dataclass_without_class_path_is_found_by_its_fields(keys) -> None:
    assert message(keys, ArgumentError(Limits(1, 3), "low: too low")) == "model.limits.low: too low"


def test_a_class_with_a_key_of_its_own_needs_no_class_path(keys) -> None:
    assert message(keys, ArgumentError("text", "broken")) == "of.its.own: str: broken"


def test_an_item_of_a_list_is_named_by_its_index(keys) -> None:
    assert message(keys, ArgumentError(NextToken(), "weight: wrong")) == "callbacks[0].init_args.weight: wrong"


def test_an_error_inside_the_error_of_a_library_gets_its_key(keys) -> None:
    wrapped = TypeError("Does not validate against any of the Union subtypes")
    wrapped.__cause__ = ArgumentError(Limits(1, 3), "high: too high")
    assert message(keys, wrapped) == "model.limits.high: too high"


def test_an_error_of_nothing_in_the_config_is_left_alone(keys) -> None:
    for error in (ValueError("weight: of whom?"), ArgumentError(object(), "weight: of whom?")):
        with pytest.raises(ValueError, match=r"^weight: of whom\?$") as raised, keys.attached():
            raise error
        assert raised.value is error


@pytest.mark.parametrize(
    ("text", "owned"), [("seed: wrong", True), ("StudentRollouts needs it", True), ("prompt 3", False)]
)
def test_only_what_begins_with_an_argument_or_the_class_belongs_to_an_object(text: str, owned: bool) -> None:
    source = StudentRollouts()
    with pytest.raises(ValueError, match=text) as raised, arguments_of(source):
        raise ValueError(text)
    assert isinstance(raised.value, ArgumentError) == owned


def test_arguments_of_a_base_class_are_those_of_the_object_too() -> None:
    class Mine(NextToken):
        def __init__(self, **rest) -> None:
            super().__init__(**rest)

    with pytest.raises(ArgumentError), arguments_of(Mine()):
        raise ValueError("label_smoothing: wrong")


def test_lists_and_mappings_tell_objects_apart_too() -> None:
    lists = (["a", "b"], ["c"])
    given = [{"class_path": "test_config_keys.Words", "init_args": {"words": words, "by": {1: 0.5}}} for words in lists]
    keys = ConfigKeys({"trainer": {"callbacks": given}}, {})
    with pytest.raises(ConfigError, match=r"^trainer\.callbacks\[1\]\.init_args\.words: too few"):
        keys.build(Words, (), {"words": ["c"], "by": {1: 0.5}})


class Words:
    def __init__(self, words: list[str], by: dict[int, float]) -> None:
        if len(words) < 2:
            raise ValueError("words: too few")


def test_a_class_of_the_same_name_elsewhere_is_another_one() -> None:
    class NextToken:
        def __init__(self, weight: float) -> None:
            raise ValueError("weight: never")

    paths = ("lit_distill.objectives.NextToken", "mine.NextToken")
    given = {name: {"class_path": path, "init_args": {"weight": 1.0}} for name, path in zip("ab", paths, strict=True)}
    with pytest.raises(ConfigError, match=r"^objectives\.b\.init_args\.weight: never"):
        ConfigKeys({"objectives": given}, {}).build(NextToken, (), {"weight": 1.0})


def test_a_second_object_of_a_class_with_a_key_of_its_own_has_the_place_it_stands_in() -> None:
    again = {"class_path": "test_config_keys.Words", "init_args": {"words": ["c"], "by": {}}}
    keys = ConfigKeys({"words": {"words": ["a", "b"], "by": {}}, "trainer": {"callbacks": [again]}}, {Words: "words"})
    with pytest.raises(ConfigError, match=r"^trainer\.callbacks\[0\]\.init_args\.words: too few"):
        keys.build(Words, (), {"words": ["c"], "by": {}})
