"""The parser of the command line: short messages for errors in a YAML file, with the key that was probably meant."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from enum import Enum
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_distill.cli.replaced import drop_arguments_of_replaced_classes, replacement_warnings
from lit_distill.evaluation import Checker
from lit_distill.generation import Engine
from lit_distill.objectives import Objective
from lit_distill.sources import Reward, Source
from lit_distill.teachers import Teacher

NAMED_BY_CLASS = (
    Objective,
    Source,
    Engine,
    Teacher,
    Checker,
    Reward,
    LightningDataModule,
    Callback,
    Optimizer,
    LRScheduler,
)
"""Base classes whose subclasses YAML can name without a module path."""

# Lines that only repeat the value or the types that jsonargparse tried: an optional value is a union with None.
_NOISE = re.compile(
    r"\s*(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|- Expected a <class 'NoneType'>|"
    r"- Expected an instantiatable class, but lit_distill\.teachers\.\S+ is abstract|"
    r"- Expected a path but .* either not accessible or invalid|Given value type: .*|Given value: .*|)"
)
_CALLABLE = re.compile(r"Type typing\.Callable\[.*\] expects a function or a callable class: ")
_INIT_ARGUMENT = re.compile(r"class_path[ =]'(?P<owner>[\w.]+)'[^\n]*\n\s*Option '(?P<key>[\w.]+)' is not accepted")
_CALLABLE_ARGUMENT = re.compile(
    r"Option '(?P<key>[\w.]+)' is not accepted. Got value: Namespace\(class_path='(?P<owner>[\w.]+)'.*"
)
_KEY = re.compile(r"(?:does not accept option|^Option) '(?P<key>[\w.]+)'|^unrecognized arguments: --(?P<word>[\w.]+)")
_GIVEN = re.compile(r"Given value: (?P<value>\{.*\})")
_MODEL = re.compile(
    r'"(?P<key>model\.(?:teacher|reference))".*'
    r"(?:Expected a dot import path string|Unexpected import path format): (?P<path>\S*[/~\\]\S*)$",
    re.DOTALL | re.MULTILINE,
)
_DISABLED = re.compile(
    r"Subclasses are disabled for ModelSpec, thus '(?P<name>[\w.]+)' is not accepted as class_path\..*"
)
_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\w+)")


def check_configs(words: Sequence[str]) -> None:
    """Check the config files on a command line; the parser's own errors do not name the file.

    Raises:
        ValueError: with the path of the file.
    """
    given = [value for word, value in pairwise(words) if word in ("--config", "-c")]
    given += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    for path in map(Path, given):
        if not path.is_file():
            close = get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
            hint = f" Did you mean {path.with_name(close[0])}?" if close else ""
            raise ValueError(f"--config: there is no file {path} (current folder: {Path.cwd()}).{hint}")
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"--config: {path} is not YAML in UTF-8: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(
                f"--config: {path} contains {'nothing' if config is None else type(config).__name__}. It must have the keys model, "
                "data and trainer, as the files in configs/ do."
            )


def without_template(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Replace a ``--data.template`` that YAML cannot parse as text; returns the words and the template to set after parsing.

    ``Q: {question}`` is a mapping in YAML, and quotes do not help: they would become part of the text.
    """
    parsed, template = list(words), None
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("--data.template", "--data.init_args.template"):
            continue
        at = index if equals else index + 1
        value = value if equals else "".join(words[at : at + 1])
        template = value if _is_not_text(value) else None
        if template is not None:
            parsed[at] = f"{name}=alpaca" if equals else "alpaca"
    return parsed, template


def _is_not_text(text: str) -> bool:
    try:
        return not isinstance(yaml.safe_load(text), str)
    except yaml.YAMLError:
        return True  # such as an open brace


class DistillParser(LightningArgumentParser):
    """A parser that prints only the error, without the list of all options that argparse prints first."""

    def parse_args(self, *arguments: Any, **named: Any) -> Namespace:  # type: ignore[override]
        """Parse; a class that replaces another one inherits none of its arguments, and a warning lists the dropped ones."""
        with drop_arguments_of_replaced_classes() as replacements:
            config: Namespace = super().parse_args(*arguments, **named)
        defaults = [action.default for parser in self._parsers() for action in parser._actions]
        for message in replacement_warnings(replacements, defaults):
            rank_zero_warn(message)
        write_enums_as_text(config)
        return config

    def _parsers(self) -> list[Any]:
        """This parser and those of its subcommands."""
        return [self, *(p for action in self._actions for p in getattr(action, "_name_parser_map", {}).values())]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        keys = [action.dest for action in parser._actions]
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"error: {readable(message, keys)}\nAll keys: {program} --help\n")
        sys.exit(2)


def write_enums_as_text(node: Any) -> None:
    """Replace enum members by their text where a class accepts text: YAML cannot represent an enum member.

    Args:
        node: a config, or a part of it; changed in place.
    """
    if isinstance(node, list):
        for item in node:
            write_enums_as_text(item)
    elif isinstance(node, dict | Namespace):
        given: Any = node.get("init_args") if "class_path" in node else None
        for name, value in list(vars(given).items()) if isinstance(given, Namespace) else ():
            if isinstance(value, str) and isinstance(value, Enum) and _takes_text(node["class_path"], name):
                given[name] = value.value
        for value in list(vars(node).values() if isinstance(node, Namespace) else node.values()):
            write_enums_as_text(value)


def _takes_text(path: str, argument: str) -> bool:
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    return argument in parameters and parameters[argument].annotation in (str, "str")


def readable(message: str, keys: Iterable[str] = ()) -> str:
    """The message of jsonargparse without its noise, and with a suggestion.

    Args:
        message: the message of the error.
        keys: the keys of the parser, such as ``trainer.max_steps``.
    """
    text = "\n".join(line for line in message.splitlines() if not _NOISE.fullmatch(line))
    text = _CALLABLE.sub("", text)
    text = _DISABLED.sub(r"Expected a local model, such as {path: ...}, got the class \g<name>.", text)
    if found := _INIT_ARGUMENT.search(text) or _CALLABLE_ARGUMENT.search(text):
        module, _, name = found["owner"].rpartition(".")
        accepted = list(inspect.signature(getattr(import_module(module), name)).parameters)
        text = _CALLABLE_ARGUMENT.sub(r"Option '\g<key>' is not accepted by \g<owner>", text)
        return text + _suggestion(found["key"], accepted) + f"\nIt accepts: {', '.join(accepted)}."
    if (about_class := _about_class(text)) is not None:
        return about_class
    if beside := _beside_class_path(message):
        listed = ", ".join(map(repr, beside))
        return f"{text.splitlines()[0]}\n  {listed}: only init_args is allowed beside class_path."
    if found := _KEY.search(text):
        return text + _suggestion(found["key"] or found["word"], keys)
    return text


def _about_class(text: str) -> str | None:
    """The message if a name in place of a class is the reason; None otherwise."""
    if found := _MODEL.search(text):
        key, path = found["key"], found["path"]
        return f"{key}: {path} is no class. For a model give {key}: {{path: {path}}}, or --{key}.path {path}."
    if not (found := _CLASS.search(text)):
        return None
    known = _known_classes()
    if found["name"] in known:  # the class is right and one of its arguments is wrong, which the lines before say
        return "\n".join(line for line in text.splitlines() if not _CLASS.search(line))
    return f"{text}\nThere is no class {found['name']!r}." + _suggestion(found["name"], known)


def _beside_class_path(message: str) -> list[str]:
    """Keys beside class_path other than init_args."""
    if "Not a valid subclass of" not in message or not (given := _GIVEN.search(message)):
        return []
    try:
        value = ast.literal_eval(given["value"])
    except (ValueError, SyntaxError):  # it contains objects, so it is not a plain mapping
        return []
    if not isinstance(value, dict) or "class_path" not in value:
        return []
    return [key for key in value if key not in ("class_path", "init_args", "dict_kwargs")]


def _suggestion(given: str, possible: Iterable[str]) -> str:
    close = get_close_matches(given, list(possible), n=1)
    return f"\nDid you mean {close[0]!r}?" if close else ""


def _known_classes() -> set[str]:
    classes: set[Any] = set()
    queue: list[Any] = list(NAMED_BY_CLASS)
    while queue:
        for subclass in queue.pop().__subclasses__():
            if subclass not in classes:
                classes.add(subclass)
                queue.append(subclass)
    return {found.__name__ for found in classes}
