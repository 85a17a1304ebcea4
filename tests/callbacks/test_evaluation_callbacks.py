"""Figures of generated text equal a plain computation, at the validations and on the prompts that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import run, tiny_config, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_distill.callbacks import BeforeAfter
from lit_distill.evaluation.ngrams import exact_match, rouge_l

pytestmark = pytest.mark.slow


def evaluator(cli):
    return next(callback for callback in cli.trainer.callbacks if type(callback).__name__ == "GenerationEvaluator")


def answers(cli, batch, count: int) -> list[str]:
    """Greedy responses by transformers itself, one prompt at a time."""
    model, tokenizer = cli.model.student.model.eval(), cli.model.tokenizer
    texts = []
    for prompt in batch.prompt_texts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=tokenizer.pad_token_id)
        texts.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize(
    ("max_prompts", "rows"),  # of a batch of so many
    [(-1, {4: [0, 1, 2, 3], 2: [0, 1]}), (3, {4: [0], 2: [0]}), (6, {4: [0, 2], 2: [0, 1]})],
)
def test_figures_are_the_means_over_prompts_spread_over_all_batches(pair, tmp_path, max_prompts, rows) -> None:
    options = ("--generation.max_prompts", max_prompts, "--trainer.logger", "false")
    cli = run("validate", "--config", write(tiny_config(pair), tmp_path / "x.yaml"), *options)
    rouge, exact = [], []
    batches = list(cli.trainer.datamodule.val_dataloader())
    assert [len(batch) for batch in batches] == [4, 4, 2]
    for batch in batches:
        texts = answers(cli, batch, 4)
        for row in rows[len(batch)]:
            rouge.append(rouge_l(texts[row], batch.references[row]))
            exact.append(100.0 * exact_match(texts[row], batch.references[row]))
    figures = cli.trainer.callback_metrics
    assert figures["val/rouge_l"].item() == pytest.approx(sum(rouge) / len(rouge), abs=1e-4)
    assert figures["val/exact_match"].item() == pytest.approx(sum(exact) / len(exact), abs=1e-4)


def test_no_prompts_no_figures(pair, tmp_path) -> None:
    options = ("--generation.max_prompts", 0, "--trainer.logger", "false")
    cli = run("validate", "--config", write(tiny_config(pair), tmp_path / "x.yaml"), *options)
    assert "val/rouge_l" not in cli.trainer.callback_metrics
    assert "val/perplexity" in cli.trainer.callback_metrics


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    config = tiny_config(pair, optimizer={"class_path": "SGD", "init_args": {"lr": 0.5}})
    config["trainer"] |= {"val_check_interval": 1, "default_root_dir": str(folder), "callbacks": ["BeforeAfter"]}
    config["trainer"]["callbacks"] = [{"class_path": "BeforeAfter", "init_args": {"max_new_tokens": 4}}]
    config["generation"] |= {"every_n_validations": 2, "num_samples": 3}
    path = write(config, folder / "x.yaml")
    return run("fit", "--config", path), path


def test_every_second_validation_answers_and_the_first_is_one(finished) -> None:
    events = EventAccumulator(finished[0].trainer.log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("val/rouge_l")] == [1, 3]
    assert [event.step for event in events.Scalars("val/perplexity")] == [1, 2, 3, 4]


def test_samples_are_a_table_in_tensorboard(finished) -> None:
    events = EventAccumulator(finished[0].trainer.log_dir)
    events.Reload()
    first, *_ = events.Tensors("val/samples/text_summary")
    table = first.tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == "| prompt | response | reference |"
    assert set(table[1]) == set("|- ")
    assert len(table) == 2 + 3
    batch = next(iter(finished[0].trainer.datamodule.val_dataloader()))
    for row, prompt in zip(table[2:], batch.prompt_texts, strict=False):
        assert row.startswith("| " + prompt.replace("\n", "<br>"))


def test_before_and_after_have_a_row_each_and_equal_an_evaluation(finished, pair) -> None:
    cli, path = finished
    table = next(callback for callback in cli.trainer.callbacks if type(callback).__name__ == "BeforeAfter")
    assert list(table.metrics) == ["student before", "student after", "teacher"]
    assert len(table.table().splitlines()) == 4
    teacher = ("--model.student.path", pair[1])
    after = ("--ckpt_path", cli.trainer.checkpoint_callback.last_model_path)
    for row, options in (("student before", ()), ("student after", after), ("teacher", teacher)):
        again = run("test", "--config", path, *options, "--trainer.callbacks", "null").trainer.callback_metrics
        for name, value in table.metrics[row].items():
            if name in ("perplexity", "reverse_kl", "rouge_l", "exact_match"):
                torch.testing.assert_close(value, again[f"test/{name}"].item(), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_has_the_row_of_the_student_before_training(finished) -> None:
    cli, path = finished
    rows = {name: row for name, row in before_after(cli).metrics.items() if name != "student after"}
    last = cli.trainer.checkpoint_callback.last_model_path
    more = ("--trainer.max_steps", str(cli.trainer.global_step + 2), "--trainer.max_epochs", "9", "--ckpt_path", last)
    resumed = before_after(run("fit", "--config", path, *more)).metrics
    assert list(resumed) == ["student before", "student after", "teacher"]
    assert {name: resumed[name] for name in rows} == rows
    assert resumed["student after"] != resumed["student before"]
    other = ("--trainer.callbacks", "[{class_path: BeforeAfter, init_args: {max_new_tokens: 3}}]")
    assert next(iter(before_after(run("fit", "--config", path, *more, *other)).metrics)).startswith("student, step ")


def test_another_student_has_a_row_and_leaves_the_run_as_it_is(finished, tmp_path) -> None:
    cli, path = finished
    exported = Path(cli.trainer.log_dir) / "export" / "last"
    compared = run("fit", "--config", path, *compare(exported), "--trainer.default_root_dir", tmp_path)
    rows = before_after(compared).metrics
    assert list(rows) == ["student before", "without teacher", "student after", "teacher"]
    assert rows["without teacher"] == pytest.approx(rows["student after"], rel=1e-5)
    assert {name: rows[name] for name in rows if name != "without teacher"} == before_after(cli).metrics
    weights = zip(cli.model.student.parameters(), compared.model.student.parameters(), strict=True)
    assert all(torch.equal(own, other) for own, other in weights)
    assert len({len(line) for line in before_after(compared).table().splitlines()}) == 1


def test_the_row_of_another_student_is_kept_until_it_is_another_model() -> None:
    kept = BeforeAfter(others={"a": "one", "b": "two"})
    kept.metrics = {"student before": {}, "teacher": {}, "a": {"rouge_l": 1.0}, "b": {"rouge_l": 2.0}}
    resumed = BeforeAfter(others={"a": "one", "b": "three"})
    resumed.load_state_dict(kept.state_dict())
    assert list(resumed.metrics) == ["student before", "teacher", "a"]


def test_what_cannot_be_compared_is_said_before_training(finished, pair, tmp_path) -> None:
    _, path = finished
    where = r"trainer\.callbacks\[0\]\.init_args\.others"
    for options, message in (
        (compare(pair[1]), rf"{where}\.without teacher: .* has another architecture than the student \(\S+ is "),
        (compare(tmp_path / "nowhere"), rf"{where}\.without teacher.*nowhere"),
        (compare(pair[0], "teacher"), r"others: 'teacher' is the name of a row"),
        ((*compare(pair[0]), "--model.student.lora", "{r: 2}"), rf"{where}: a student with adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            run("fit", "--config", path, *options, "--trainer.default_root_dir", tmp_path)


def compare(folder: Path, name: str = "without teacher") -> tuple[str, str]:
    arguments = {"max_new_tokens": 4, "others": {name: str(folder)}}
    return "--trainer.callbacks", json.dumps([{"class_path": "BeforeAfter", "init_args": arguments}])


def before_after(cli):
    return next(callback for callback in cli.trainer.callbacks if type(callback).__name__ == "BeforeAfter")
