"""The command line in this process, on tiny models and generated tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import yaml

from lit_distill.cli import app as cli
from lit_distill.cli.app import DistillCLI


class SharedParserCLI(DistillCLI):
    """The command line with a parser that is built once a process: building it takes longer than most of what is tested."""

    _parsers: ClassVar[dict[tuple[Any, ...], dict[str, Any]]] = {}

    def __init__(self, args: list[str], **settings: Any) -> None:
        self._prints = any("help" in word or "print_config" in word for word in args)  # these have longer descriptions
        super().__init__(args, **settings)

    def setup_parser(self, add_subcommands: bool, *arguments: Any) -> None:
        """Take the parser of an earlier run of the same subcommand, with what Lightning keeps beside it."""
        parts = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
        defaults = sorted((key, repr(value)) for key, value in self.trainer_defaults.items() if key != "callbacks")
        shape = (add_subcommands, self._subcommand, self._prints, *defaults)
        if shape not in self._parsers:
            super().setup_parser(add_subcommands, *arguments)
            self._parsers[shape] = {name: vars(self)[name] for name in parts if name in vars(self)}
        vars(self).update(self._parsers[shape])


def tiny_config(pair: tuple[Path, Path], **model: Any) -> dict[str, Any]:
    """Everything that a run needs, small."""
    student, teacher = pair
    return {
        "seed_everything": 3,
        "model": {
            "student": {"path": str(student)},
            "teacher": {"path": str(teacher)},
            "objectives": {"kd": "ForwardKL", "ce": {"class_path": "NextToken", "init_args": {"weight": 0.5}}},
            **model,
        },
        "data": {
            "class_path": "ProceduralData",
            "init_args": {"num_train": 48, "num_validation": 10, "num_test": 4, "batch_size": 8, "eval_batch_size": 4},
        },
        "trainer": {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1},
        "generation": {"max_new_tokens": 4},
        "calibration": {"next_token": False},  # the diagram of a validation takes half as long as the rest of a run
        "report": {"enabled": False},  # its page takes longer than the test
    }


def write(config: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def run(*arguments: object, **settings: Any) -> DistillCLI:
    """What `lit-distill` with these arguments does, without the console script around it."""
    with patch.object(sys, "argv", ["lit-distill"]):
        return SharedParserCLI([str(argument) for argument in arguments], **settings)


def main(*arguments: object) -> None:
    """The console script: `run`, and errors as messages."""
    with patch.object(sys, "argv", ["lit-distill"]), patch.object(cli, "DistillCLI", SharedParserCLI):
        cli.main([str(argument) for argument in arguments])
