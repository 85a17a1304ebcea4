"""Runs of these tests share a parser: what it makes of a config must not depend on what it has parsed before."""

from __future__ import annotations

import pytest
from command_line import SharedParserCLI, run, tiny_config, write

METHODS = {
    "offline": {"optimizer": "AdamW", "lr_scheduler": "WarmupConstant"},
    "rollouts": {
        "source": {"class_path": "TeacherMixedRollouts", "init_args": {"alpha": 0.3, "mini_batch_size": 4}},
        "objectives": {"long": "PolicyGradient", "single": "ReverseKL"},
    },
}


class Parsed(Exception):  # noqa: N818 - the end of a run that was only to parse
    """A config, as text."""


@pytest.fixture
def parsed(monkeypatch):
    """What `fit` would run with."""

    def stop(cli: SharedParserCLI) -> None:
        raise Parsed(cli.parser.dump(cli.config))

    monkeypatch.setattr(SharedParserCLI, "before_instantiate_classes", stop)

    def parse(*arguments: object) -> str:
        with pytest.raises(Parsed) as caught:
            run("fit", *arguments)
        return str(caught.value)

    return parse


@pytest.mark.slow
def test_a_parser_that_others_have_used_says_what_a_new_one_says(pair, tmp_path, monkeypatch, parsed) -> None:
    configs = {name: write(tiny_config(pair, **model), tmp_path / f"{name}.yaml") for name, model in METHODS.items()}
    alone = {}
    for name, config in configs.items():
        monkeypatch.setattr(SharedParserCLI, "_parsers", {})
        alone[name] = parsed("--config", config)
    assert len(set(alone.values())) == 2
    monkeypatch.setattr(SharedParserCLI, "_parsers", {})
    wrong = write({**tiny_config(pair), "modle": 1}, tmp_path / "wrong.yaml")
    parsed("--config", configs["rollouts"], "--model.objectives.single", "NextToken", "--trainer.max_steps", 1)
    with pytest.raises(SystemExit, match="2"):
        run("fit", "--config", wrong)
    assert {name: parsed("--config", config) for name, config in configs.items()} == alone
    assert len(SharedParserCLI._parsers) == 1
