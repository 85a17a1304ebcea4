"""`lit-distill` from the YAML to the files that it leaves behind."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import run, tiny_config, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_distill.cli.runs import run_loggers

FIGURES = ("perplexity", "forward_kl", "reverse_kl", "top1_agreement", "rouge_l", "exact_match")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """One complete `fit`, and the folder it was started in."""
    folder = tmp_path_factory.mktemp("fit")
    config = tiny_config(pair, optimizer={"class_path": "AdamW", "init_args": {"lr": 0.02}})
    del config["calibration"]  # every callback as it is by default
    config["trainer"]["default_root_dir"] = str(folder / "runs")
    return run("fit", "--config", write(config, folder / "tiny.yaml")), folder


def log_of(cli) -> list[dict[str, str]]:
    with (Path(cli.trainer.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_fit_leaves_logs_config_checkpoints_and_exported_students(finished) -> None:
    cli, folder = finished
    log_dir = Path(cli.trainer.log_dir)
    assert log_dir == folder / "runs" / "tiny" / "version_0"
    left = {str(path.relative_to(log_dir)) for path in log_dir.rglob("*") if path.is_file()}
    assert {"metrics.csv", "config.yaml", "checkpoints/last.ckpt"} <= left
    assert any(name.startswith("events.out.tfevents") for name in left)
    assert {"export/last/model.safetensors", "export/best/model.safetensors"} <= left


def test_the_exported_student_loads_elsewhere_and_says_the_same(finished) -> None:
    cli, _ = finished
    folder = Path(cli.trainer.log_dir) / "export" / "last"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Sort the words.\nred cat\n", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = cli.model.student.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id


def test_tensorboard_has_the_figures_at_optimiser_steps(finished) -> None:
    cli, _ = finished
    events = EventAccumulator(cli.trainer.log_dir)
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name in ("loss", "kd", "ce", "learning_rate"):
        assert steps[f"train/{name}"] == [1, 2, 3, 4]
    for name in (*FIGURES, "loss", "kd", "ce"):
        assert steps[f"val/{name}"] == [2, 4]
    assert "val/samples/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(("stage", "prefix"), [("validate", "val"), ("test", "test")])
def test_evaluation_reports_figures_of_tokens_and_of_generated_text(pair, tmp_path, stage, prefix) -> None:
    cli = run(stage, "--config", write(tiny_config(pair), tmp_path / "tiny.yaml"), "--trainer.logger", "false")
    figures = cli.trainer.callback_metrics
    assert {f"{prefix}/{name}" for name in FIGURES} <= set(figures)
    assert all(torch.isfinite(value) for value in figures.values())


def test_evaluation_of_a_checkpoint_reports_what_fit_reported(finished) -> None:
    cli, folder = finished
    again = run(
        "validate", "--config", folder / "tiny.yaml", "--ckpt_path", cli.trainer.checkpoint_callback.last_model_path
    )
    for name in FIGURES:
        torch.testing.assert_close(
            again.trainer.callback_metrics[f"val/{name}"], cli.trainer.callback_metrics[f"val/{name}"]
        )


def predict(config: Path, *more: object) -> list[dict]:
    run("predict", "--config", config, "--model.prediction.max_new_tokens", 4, *more)
    return [json.loads(line) for line in Path("predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("speaker", ["student", "teacher"])
def test_predictions_are_what_the_speaker_says_greedily(pair, tmp_path, speaker) -> None:
    options = ("--model.prediction.model", speaker, "--model.prediction.temperature", 0)
    records = predict(write(tiny_config(pair), tmp_path / "tiny.yaml"), *options, "--model.prediction.logprobs", "true")
    folder = pair[("student", "teacher").index(speaker)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len({record["id"] for record in records}) == len(records) >= 4
    for record in records[:4]:
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        for token, logprob in zip(record["tokens"], record["logprobs"], strict=True):
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            assert token == scores.argmax()
            assert logprob == pytest.approx(scores[token].item(), abs=1e-4)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert record["response"] == tokenizer.decode(record["tokens"], skip_special_tokens=True)


def test_a_killed_prediction_goes_on_where_it_stopped(pair, tmp_path) -> None:
    config = write(tiny_config(pair), tmp_path / "tiny.yaml")
    whole = predict(config, "--data.eval_batch_size", 2)
    path = Path("predictions.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2], encoding="utf-8")
    assert predict(config, "--data.eval_batch_size", 2) == whole


def test_sequence_level_distillation_is_two_commands(pair, tmp_path) -> None:
    config = tiny_config(pair)
    responses = predict(write(config, tmp_path / "tiny.yaml"), "--model.prediction.model", "teacher")
    config["model"]["objectives"] = {"ce": "NextToken"}
    config["data"] = {
        "class_path": "InstructionData",
        "init_args": {
            "train": {"path": "predictions.jsonl"},
            "fields": {"output": "response"},
            "template": "{prompt}",
            "batch_size": len([record for record in responses if record["response"]]),
        },
    }
    del config["model"]["teacher"]
    none = ("--checkpoint.monitor", "null", "--trainer.max_steps", 2, "--trainer.val_check_interval", "null")
    cli = run("fit", "--config", write(config, tmp_path / "seqkd.yaml"), *none)
    assert cli.trainer.global_step == 2
    batch = next(iter(cli.trainer.datamodule.train_dataloader()))
    tokenizer = cli.model.tokenizer
    said = {record["id"]: record for record in responses}
    text = batch.sequences
    for item, ids, here, target in zip(batch.ids, text.input_ids, text.attention_mask, text.target_mask, strict=True):
        end = [tokenizer.eos_token_id] if said[item]["finished"] else []  # what was cut off does not end
        assert ids[target].tolist() == tokenizer(said[item]["response"]).input_ids + end
        assert ids[here.bool() & ~target].tolist() == tokenizer(said[item]["prompt"]).input_ids


OVERRIDES = {
    "model.objectives.kd.weight": (0.3, lambda cli: cli.model.objectives["kd"].weight),
    "model.objectives.ce.weight": (2.0, lambda cli: cli.model.objectives["ce"].weight),
    "model.optimizer.lr": (3e-4, lambda cli: cli.model.optimizer_factory([torch.zeros(1)]).defaults["lr"]),
    "model.student.keep_layers": (1, lambda cli: cli.model.student_spec.keep_layers),
    "data.batch_size": (4, lambda cli: cli.datamodule.batch_size),
    "data.init_args.num_train": (16, lambda cli: cli.datamodule.counts["train"]),
    "trainer.max_steps": (3, lambda cli: cli.trainer.max_steps),
    "generation.temperature": (0.5, lambda cli: next(iter_generation(cli)).sampling.temperature),
    "checkpoint.filename": ("{step}", lambda cli: cli.trainer.checkpoint_callback.filename),
    "seed_everything": (7, lambda cli: cli.datamodule.seed),
}


def iter_generation(cli):
    return (callback for callback in cli.trainer.callbacks if type(callback).__name__ == "GenerationEvaluator")


def test_any_nested_key_can_be_overridden(pair, tmp_path) -> None:
    options = [part for key, (value, _) in OVERRIDES.items() for part in (f"--{key}", value)]
    cli = run("--config", write(tiny_config(pair), tmp_path / "tiny.yaml"), *options, run=False)
    for key, (value, got) in OVERRIDES.items():
        assert got(cli) == value, key


def test_classes_need_no_module_names(pair, tmp_path) -> None:
    config = tiny_config(pair, optimizer="AdamW", lr_scheduler="WarmupConstant", source="DatasetResponses")
    config["trainer"]["callbacks"] = [{"class_path": "BeforeAfter"}, "LearningRateMonitor"]
    cli = run("--config", write(config, tmp_path / "tiny.yaml"), run=False)
    assert {"BeforeAfter", "LearningRateMonitor"} <= {type(callback).__name__ for callback in cli.trainer.callbacks}


def test_the_printed_config_parses_back_to_itself(pair, tmp_path, capsys) -> None:
    printed = []
    path = write(tiny_config(pair, lr_scheduler="WarmupCosine"), tmp_path / "tiny.yaml")
    for _ in range(2):
        with pytest.raises(SystemExit, match="0"):
            run("fit", "--config", path, "--print_config")
        printed.append(capsys.readouterr().out)
        path.write_text(printed[-1])
    assert printed[0] == printed[1]
    assert yaml.safe_load(printed[0])["model"]["objectives"]["ce"]["init_args"]["weight"] == 0.5


def quick(pair, tmp_path, *options: object):
    return run(
        "fit", "--config", write(tiny_config(pair), tmp_path / "tiny.yaml"), "--export.enabled", "false", *options
    )


@pytest.mark.slow
def test_a_seed_fixes_every_figure_and_another_seed_the_order(pair, tmp_path) -> None:
    first, again, other = (log_of(quick(pair, tmp_path, "--seed_everything", seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_seed_may_be_left_to_chance(pair, tmp_path, value) -> None:
    assert quick(pair, tmp_path, "--seed_everything", value, "--trainer.max_steps", 2).trainer.global_step == 2


def test_the_cosine_warms_up_linearly_and_ends_at_the_final_ratio(pair, tmp_path) -> None:
    schedule = ("--model.lr_scheduler", "WarmupCosine", "--model.lr_scheduler.warmup_steps", 3)
    ratio = ("--model.lr_scheduler.final_ratio", 0.1, "--model.optimizer.lr", 1.0, "--trainer.max_steps", 13)
    rows = log_of(
        quick(pair, tmp_path, *schedule, *ratio, "--trainer.limit_val_batches", 0, "--checkpoint.monitor", "null")
    )
    rates = [float(row["train/learning_rate"]) for row in rows if row["train/learning_rate"]]
    cosine = [0.1 + 0.9 * 0.5 * (1 + torch.tensor(torch.pi * step / 10).cos().item()) for step in range(11)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, *cosine[:-1]], abs=1e-6)


def test_what_one_model_said_is_not_continued_by_the_other(pair, tmp_path) -> None:
    config = write(tiny_config(pair), tmp_path / "tiny.yaml")
    predict(config, "--model.prediction.model", "teacher")
    with pytest.raises(ValueError, match=r"model\.prediction\.path: .* contains responses of the teacher"):
        predict(config, "--model.prediction.model", "student")


def test_what_other_weights_said_or_to_other_prompts_is_not_continued(pair, tmp_path) -> None:
    config = write(tiny_config(pair), tmp_path / "tiny.yaml")
    run(
        "fit",
        "--config",
        config,
        "--trainer.max_steps",
        1,
        "--trainer.limit_val_batches",
        0,
        "--checkpoint.monitor",
        "null",
    )
    first = predict(config)
    moved = shutil.copytree(pair[0], tmp_path / "moved")
    assert predict(config, "--model.student.path", moved) == first  # the same weights
    other = r"model\.prediction\.path: predictions.jsonl contains responses of another student: .*\.path and ckpt_path"
    with pytest.raises(ValueError, match=other):
        predict(config, "--model.student.path", pair[1])
    with pytest.raises(ValueError, match=other):
        predict(config, "--ckpt_path", "last")
    prompts = r"model\.prediction\.path: predictions.jsonl has answers to other prompts, such as of .*data\.init_args\.template"
    with pytest.raises(ValueError, match=prompts):
        predict(config, "--data.init_args.task_seed", 5)
    assert predict(config) == first


def test_greedy_and_sampled_responses_are_not_mixed_in_one_file(pair, tmp_path) -> None:
    config = write(tiny_config(pair), tmp_path / "tiny.yaml")
    assert predict(config)[0]["decoding"]["temperature"] == 1.0
    with pytest.raises(
        ValueError, match=r"model\.prediction\.path: .* with temperature 1.0, but now temperature 0.5 is"
    ):
        predict(config, "--model.prediction.temperature", 0.5)
    with pytest.raises(ValueError, match=r"model\.prediction\.path: .* is a folder"):
        predict(config, "--model.prediction.path", tmp_path)


def test_ids_that_stand_twice_are_refused_where_a_file_is_continued_by_them(pair, tmp_path) -> None:
    config = tiny_config(pair)
    lines = [json.dumps({"id": i // 2, "instruction": f"Say {i}", "output": "x"}) for i in range(6)]
    (tmp_path / "twice.jsonl").write_text("\n".join(lines))
    config["data"] = {"class_path": "InstructionData", "init_args": {"train": {"path": str(tmp_path / "twice.jsonl")}}}
    with pytest.raises(ValueError, match=r"data\.init_args\.predict: 3 duplicate ids, such as '0' \(2 times\)"):
        predict(write(config, tmp_path / "tiny.yaml"))


def test_runs_that_start_at_once_do_not_share_a_folder(tmp_path) -> None:
    (tmp_path / "run" / "version_3").mkdir(parents=True)
    versions = [run_loggers(tmp_path, "run")[0].version for _ in range(2)]  # neither has written anything yet
    assert versions == [4, 5]
