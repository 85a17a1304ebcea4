"""A study as its YAML file describes it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")
CHECKOUT = Path(__file__).parents[2]
OWN = {"seed_everything", "run_name", "trainer.default_root_dir"}
"""Arguments that the study itself gives to each run."""


def _check_type(given: Any, kind: Any, expected: str, *keys: str) -> None:
    for key in keys:
        if not isinstance(value := getattr(given, key), kind):
            raise ValueError(f"{key}: expected {expected}, got {value!r}.")


@dataclass(frozen=True)
class Method:
    """What a run gets beside what every run gets."""

    configs: Sequence[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] | str = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_type(self, Mapping, "a mapping", "arguments")
        _check_type(self, list | tuple, "a list", "configs")


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

    def best(self, courses: Sequence[Sequence[float]]) -> int | None:
        """The position of the course that reaches the best value, the first of equal ones; None if none has a value."""
        sign = -1 if self.mode == "max" else 1
        found = [(min(sign * value for value in course), place) for place, course in enumerate(courses) if course]
        return min(found)[1] if found else None


@dataclass(frozen=True)
class Study:
    """A study as its YAML describes it; see the top of ``tools/study.py``."""

    folder: Path
    methods: Mapping[str, Method]
    seeds: Sequence[int] = (1, 2, 3)
    configs: Sequence[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    starts: Mapping[str, Method] = field(default_factory=dict)
    tune: Tuning | None = None
    test: Method = Method()
    checkpoint: Literal["best", "last"] = "best"
    metrics: Sequence[str] = ("rouge_l", "exact_match", "perplexity")
    training_metrics: Sequence[str] = ()
    curves: Sequence[str] = ()

    def __post_init__(self) -> None:
        if both := sorted(self.starts.keys() & self.methods.keys()):
            raise ValueError(f"methods: {both[0]} is one of starts too. Give it another name.")
        _check_type(self, Mapping, "a mapping", "arguments")
        _check_type(self, list | tuple, "a list", "configs", "seeds", "metrics", "training_metrics", "curves")
        if wrong := [name for name in self.starts if not re.fullmatch(r"\w+", name)]:
            raise ValueError(f"starts.{wrong[0]}: a name has letters, digits and underscores only.")
        if starts_in(self.arguments):
            raise ValueError("arguments: a start cannot begin with itself. Give its name in the arguments of methods.")
        for name, method in self.methods.items():
            if unknown := sorted(set(starts_in(method.arguments)) - self.starts.keys()):
                given = ", ".join(self.starts) or "none"
                raise ValueError(f"methods.{name}.arguments: {{{unknown[0]}}} is none of starts; there are {given}.")
        if self.checkpoint not in ("best", "last"):
            raise ValueError(f"checkpoint: expected best or last, got {self.checkpoint!r}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(type(one) is int for one in self.seeds):
            raise ValueError(f"seeds: expected a list of different numbers, got {self.seeds}.")
        runs = [*self.starts.values(), *self.methods.values()]
        files = [*self.configs, *(file for method in runs for file in method.configs)]
        if missing := [file for file in files if not (CHECKOUT / file).is_file()]:
            raise ValueError(f"configs: there is no file {CHECKOUT / missing[0]}.")
        self._check_tuning()
        self._check_own_arguments()

    def _check_own_arguments(self) -> None:
        every = {"arguments": self.arguments, "test.arguments": self.test.arguments}
        every |= {f"starts.{name}.arguments": method.arguments for name, method in self.starts.items()}
        every |= {f"methods.{name}.arguments": method.arguments for name, method in self.methods.items()}
        for key, given in every.items():
            if own := sorted(OWN & given.keys()):
                raise ValueError(f"{key}: {own[0]} is set by the study, by its seeds, names and folder. Remove it.")

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

    def starts_of(self, methods: Collection[str]) -> list[str]:
        """The starts that some methods begin with, in the study's order."""
        named = {name for method in methods for name in starts_in(self.methods[method].arguments)}
        return [name for name in self.starts if name in named]

    def with_starts(self, methods: Collection[str]) -> list[str]:
        """Some methods, and before them the starts that they begin with."""
        return [*self.starts_of(methods), *methods]

    @classmethod
    def read(cls, file: Path) -> Study:
        """Read a study.

        Raises:
            ValueError: naming the file and the key that is missing, unknown or wrong.
        """
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            _check_keys(cls, values, "", {"folder", "methods"})
            values |= {key: _methods(values[key], key) for key in ("methods", "starts") if key in values}
            if "test" in values:
                values["test"] = _read(Method, values["test"], "test")
            if "tune" in values:
                values["tune"] = _read(Tuning, values["tune"], "tune", {"arguments", "metric"})
            return cls(**{**values, "folder": _folder(values["folder"])})
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{file}: {error}") from error


def _folder(given: Any) -> Path:
    if not isinstance(given, str):
        raise ValueError(f"folder: expected a path, got {given!r}.")
    return Path(given)


def starts_in(arguments: Mapping[str, Any]) -> list[str]:
    """The starts that are values of arguments, however deep: each is the whole value of a ``path``, a name in braces."""
    return re.findall(r"path': '\{(\w+)\}'", repr(arguments))


def _methods(given: Any, key: str) -> dict[str, Method]:
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{key}: expected {key} by name, got {given}.")
    return {name: _read(Method, value or {}, f"{key}.{name}") for name, value in given.items()}


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
