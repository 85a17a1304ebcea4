"""Wrong values in a config: each is refused before any weights load, in one message that names the key and what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
from bad_input.conftest import REMOVED, mixed

ADAM = {"class_path": "AdamW", "init_args": {}}
JUDGE = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": None}


def judge(**wrong: Any) -> dict[str, Any]:
    return {"trainer.callbacks": [{"class_path": "Judge", "init_args": {"endpoint": JUDGE, **wrong}}]}


def optimizer(name: str = "AdamW", **arguments: Any) -> dict[str, Any]:
    return {"model.optimizer": {"class_path": name, "init_args": arguments}}


def scheduler(name: str, **arguments: Any) -> dict[str, Any]:
    return {"model.lr_scheduler": {"class_path": name, "init_args": arguments}}


def source(name: str, **arguments: Any) -> dict[str, Any]:
    return {"model.source": {"class_path": name, "init_args": arguments}}


def kd(name: str, **arguments: Any) -> dict[str, Any]:
    return {"model.objectives": {"kd": {"class_path": name, "init_args": arguments}}}


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"trainer.callbacks": [{"class_path": name, "init_args": arguments}]}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    # of another type
    "steps in words": ({"trainer.max_steps": "many"}, r"trainer\.max_steps.*\n.*int.*many"),
    "half an item": ({"data.init_args.batch_size": 2.5}, r"batch_size"),
    "a micro batch in words": ({"model.micro_batch_size": "four"}, r"model\.micro_batch_size"),
    "objectives without names": ({"model.objectives": "ForwardKL"}, r"model\.objectives"),
    "no objectives": ({"model.objectives": {}}, r"model\.objectives: at least one .*`kd: ForwardKL`"),
    "a student that is only a path": ({"model.student": "gpt2"}, r"model\.student"),
    "no student": ({"model.student": REMOVED}, r"model\.student"),
    "a student without a path": ({"model.student": {"dtype": "float32"}}, r"model\.student\.path"),
    "no data": ({"data": REMOVED}, r"data"),
    "an unknown dtype": ({"model.student.dtype": "float64"}, r"model\.student"),
    "an unknown speaker": ({"model.prediction.model": "nobody"}, r"model\.prediction.*student"),
    "no seed": ({"seed_everything": "x"}, r"seed_everything"),
    "a negative seed": ({"seed_everything": -1}, r"seed"),
    "a class that is no objective": (kd("torch.nn.Linear"), r"model\.objectives"),
    "a class that is not there": (kd("my_objectives.Mine"), r"my_objectives"),
    "a callback that is none": (callback("torch.nn.Identity"), r"trainer\.callbacks"),
    # numbers that cannot be
    "micro batch 0": ({"model.micro_batch_size": 0}, r"model\.micro_batch_size: expected at least 1, got 0"),
    "head rows 0": ({"model.head_chunk_rows": 0}, r"model\.head_chunk_rows: expected at least 1, got 0"),
    "no steps": ({"trainer.max_steps": 0}, r"trainer\.max_steps: 0"),
    "no epochs": ({"trainer.max_steps": -1, "trainer.max_epochs": 0}, r"trainer\.max_epochs: 0"),
    "no training batches": ({"trainer.limit_train_batches": 0}, r"trainer\.limit_train_batches: 0"),
    "a negative clip": ({"trainer.gradient_clip_val": -1.0}, r"trainer\.gradient_clip_val: .* got -1"),
    "an unknown clip": ({"trainer.gradient_clip_algorithm": "nrom"}, r"gradient_clip_algorithm"),
    "a negative learning rate": (optimizer(lr=-0.1), r"model\.optimizer: .*-0\.1"),
    "a negative weight decay": (optimizer(weight_decay=-1), r"model\.optimizer: .*weight_decay"),
    "an infinite learning rate": (optimizer(lr=float("inf")), r"model\.optimizer.*inf"),
    "an optimiser without its arguments": (optimizer("torch.optim.Muon", lr=0.1), r"model\.optimizer: Muon"),
    "a negative warm-up": (
        scheduler("WarmupCosine", warmup_steps=-1),
        r"model\.lr_scheduler\.init_args\.warmup_steps.*-1",
    ),
    "a scheduler without its arguments": (scheduler("torch.optim.lr_scheduler.StepLR"), r"step_size"),
    "a negative weight": (kd("ForwardKL", weight=-1), r"model\.objectives\.kd\b.*weight.*-1"),
    "a weight that is no number": (kd("ForwardKL", weight=float("nan")), r"model\.objectives\.kd\b.*weight.*nan"),
    "a temperature of 0": (kd("ForwardKL", temperature=0), r"model\.objectives\.kd\b.*temperature.*0"),
    "a mixture outside (0, 1)": (kd("JensenShannon", beta=1.5), r"model\.objectives\.kd\b.*beta.*1\.5"),
    "a skew outside": (kd("SkewForwardKL", skew=2), r"model\.objectives\.kd\b.*skew.*2"),
    "a share of the teacher above 1": (mixed(alpha=1.5), r"model\.source\.init_args\.alpha: .*\[0, 1\], got 1\.5"),
    "a negative share of the teacher": (mixed(alpha=-0.1), r"model\.source\.init_args\.alpha: .*\[0, 1\], got -0\.1"),
    "no inner epochs": (mixed(inner_epochs=0), r"model\.source\.init_args\.inner_epochs: expected at least 1, got 0"),
    "mini-batches larger than the phase": (
        mixed(mini_batch_size=64),
        r"model\.source\.init_args\.mini_batch_size: 64 .*data\.init_args\.batch_size \(8\)",
    ),
    "rollouts of nothing": (mixed(max_new_tokens=0), r"model\.source.*max_new_tokens: expected at least 1, got 0"),
    "a share of batches above 1": (source("StudentRollouts", on_policy_fraction=2), r"on_policy_fraction.*got 2"),
    "top_p 0": (source("StudentRollouts", top_p=0), r"model\.source.*top_p.*got 0"),
    "a negative temperature of predictions": (
        {"model.prediction.temperature": -1},
        r"model\.prediction.*temperature.*-1",
    ),
    "greedy tokens of generations": ({"generation.top_k": -1}, r"generation.*top_k.*-1"),
    "generations of nothing": ({"generation.max_new_tokens": 0}, r"generation.*max_new_tokens.*got 0"),
    "a negative buffer": (source("ReplayRollouts", capacity=0), r"model\.source\.init_args\.capacity: .*got 0"),
    "a buffer smaller than a batch": (source("ReplayRollouts", capacity=4), r"capacity: 4 .*batch_size \(8\)"),
    "a replay probability above 1": (source("ReplayRollouts", initial_probability=2), r"initial_probability.*got 2"),
    "rollouts every 0 phases": ({"rollouts.every_n_phases": 0}, r"rollouts\.every_n_phases: .*got 0"),
    "a negative share of validation": (
        {"data": {"class_path": "InstructionData", "init_args": {"train": {"path": "x.jsonl"}, "validation_size": -1}}},
        r"data\.init_args\.validation_size.*-1",
    ),
    "a prompt as long as the text": (
        {"data.init_args.max_prompt_length": 256},
        r"data\.init_args\.max_prompt_length: 256 must be less than max_length",
    ),
    "one word to choose from": (
        {"calibration.tasks": {"mood": {"path": "x.jsonl", "template": "{text}", "words": [" a"]}}},
        r"calibration\.tasks\.mood\.words: expected at least two words",
    ),
    "rows of one token": (
        {"data.init_args.corpus": {"length": 1}},
        r"data\.init_args\.corpus\.length: expected at least 2, got 1",
    ),
    "items of no number": ({"data.init_args.num_train": 0}, r"data\.init_args\.num_train: expected at least 1, got 0"),
    "mini-batches larger than the data": (
        {**mixed(mini_batch_size=8), "data.init_args.num_train": 6},
        r"model\.source\.init_args\.mini_batch_size: 8 .* 6 items",
    ),
    "a corpus row of one token": ({"data.init_args.corpus": {"length": 1}}, r"data\.init_args\.corpus\.length"),
    # contradictions
    "an objective without a teacher": ({"model.teacher": None}, r"model\.objectives\.kd: .* Set model\.teacher\.path"),
    "another tokenizer on a server": (
        {
            "model.teacher": {
                "class_path": "AlignedTeacher",
                "init_args": {"teacher": {"class_path": "ServerTeacher", "init_args": {"url": "http://127.0.0.1:9"}}},
            }
        },
        r"model\.teacher.*\n.*AlignedTeacher.*\n.*local model, such as \{path: \.\.\.\}, got the class ServerTeacher\.",
    ),
    "a teacher who is to speak and is not": (
        {"model.teacher": None, "model.objectives": {"ce": "NextToken"}, **source("TeacherRollouts")},
        r"model\.source: .* Set model\.teacher\.path",
    ),
    "rewards without rollouts": (
        {"model.objectives": {"long": "PolicyGradient"}},
        r"model\.objectives\.long: PolicyGradient needs `advantages`.*DatasetResponses",
    ),
    "a preference without pairs": (kd("DirectPreference"), r"model\.objectives\.kd: .*Set source: ResponsePairs"),
    "pairs without a preference": (source("ResponsePairs"), r"model\.source: ResponsePairs.*`dpkd: DirectPreference`"),
    "pairs of nobody": (source("ResponsePairs", chosen="nobody"), r"model\.source"),
    "truncated draws of a mixture": (mixed(top_k=5), r"model\.source\.init_args\.alpha: .*top_k: 0"),
    "two temperatures": (
        mixed(temperature=0.5),
        r"model\.objectives\.long\.temperature: 1.*Set both to the same value",
    ),
    "a corpus objective without a corpus": (
        {"model.corpus_objectives": {"lm": "NextToken"}},
        r"model\.corpus_objectives: there is no corpus.*data\.init_args\.corpus",
    ),
    "fewer rows of the corpus than steps": (
        {
            **mixed(inner_epochs=4),
            "model.corpus_objectives": {"lm": "NextToken"},
            "data.init_args.corpus": {"batch_size": 2, "length": 16},
        },
        r"data\.init_args\.corpus\.batch_size: 2 .*8",
    ),
    "a reward on the corpus": (
        {"model.corpus_objectives": {"lm": "PolicyGradient"}},
        r"model\.corpus_objectives\.lm: .*a plain-text corpus",
    ),
    "one name twice": ({"model.corpus_objectives": {"kd": "NextToken"}}, r"model\.corpus_objectives: 'kd'"),
    "weights that are all 0": (kd("ForwardKL", weight=0), r"model\.objectives: every weight is 0"),
    "a schedule of a missing objective": (
        callback("ObjectiveWeightSchedule", objective="kl", end=0.0),
        r"trainer\.callbacks\[0\]\.init_args\.objective: there is no objective 'kl'\. Give one of",
    ),
    "a schedule of a missing mixture": (callback("TeacherMixSchedule"), r"TeacherMixSchedule: .*TeacherMixedRollouts"),
    "training without responses": ({"data.init_args.responses": False}, r"data\.init_args\.responses: true"),
    # the Trainer
    "a scheduler that waits for a figure": (
        scheduler("torch.optim.lr_scheduler.ReduceLROnPlateau"),
        r"ReduceLROnPlateau",
    ),
    "a name with a dot": ({"model.objectives": {"a.b": "NextToken"}}, r"model\.objectives: 'a\.b' cannot be a name"),
    "a name of a metric": (
        {"model.objectives": {"rouge_l": "NextToken"}},
        r"model\.objectives: 'rouge_l' is the name of a metric",
    ),
    "a name of a dictionary": (
        {"model.objectives": {"keys": "NextToken"}},
        r"model\.objectives: 'keys' cannot be a name",
    ),
    "an unknown way with NaN": ({"model.on_nonfinite": "ignore"}, r"model\.on_nonfinite"),
    "accumulated gradients": ({"trainer.accumulate_grad_batches": 2}, r"model\.micro_batch_size"),
    "an unknown precision": ({"trainer.precision": "17-mixed"}, r"trainer\.precision"),
    "float16": ({"trainer.precision": "16-mixed"}, r"trainer\.precision: 16-mixed .*bf16-mixed"),
    "float16 throughout": ({"trainer.precision": "16-true"}, r"trainer\.precision: 16-true .*bf16-mixed"),
    "an unknown strategy": ({"trainer.strategy": "ddpp"}, r"trainer\.strategy: .*fsdp2, got 'ddpp'"),
    "Lightning's FSDP": ({"trainer.strategy": "fsdp"}, r"trainer\.strategy: .*fsdp2"),
    "DeepSpeed": ({"trainer.strategy": "deepspeed_stage_3"}, r"trainer\.strategy: .*fsdp2"),
    "a GPU that is not there": ({"trainer.accelerator": "gpu"}, r"accelerator|GPU"),
    "no devices": ({"trainer.devices": 0}, r"trainer\.devices|devices"),
    "a validation after the end of the epoch": ({"trainer.val_check_interval": 100}, r"trainer\.val_check_interval"),
    "a validation at one and a half epochs": ({"trainer.val_check_interval": 1.5}, r"trainer\.val_check_interval"),
    "a saver without saving": (
        {"trainer.enable_checkpointing": False},
        r"trainer\.enable_checkpointing",
    ),
    "Lightning's saving by steps": (
        callback("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=2),
        r"RunCheckpoint",
    ),
    "watching what nobody measures": (
        {"trainer.limit_val_batches": 0, "checkpoint.monitor": "val/loss"},
        r"checkpoint\.monitor: val/loss .*checkpoint\.monitor: null",
    ),
    "a mode that is none": ({"checkpoint.mode": "least"}, r"checkpoint: RunCheckpoint: .*min, max but got least"),
    "the best of nothing": ({"checkpoint.monitor": None, "checkpoint.save_top_k": 3}, r"checkpoint: .*save_top_k=3"),
    "a callback's mode that is none": (
        callback("EarlyStopping", monitor="val/loss", mode="least"),
        r"trainer\.callbacks\[0\]: EarlyStopping: .*got least",
    ),
    "bare bones": ({"trainer.barebones": True}, r"barebones"),
    # callbacks
    "an unknown dtype of the export": ({"export.dtype": "int8"}, r"export\.dtype: expected float32.*'int8'"),
    "one bin": ({"calibration.num_bins": 1}, r"calibration\.num_bins: expected at least 2, got 1"),
    "a task that is not there": (
        {"calibration.tasks": {"t": {"path": "nowhere.jsonl"}}},
        r"calibration\.tasks",
    ),
    "texts longer than the longest": (
        {"exposure_bias.lengths": [500]},
        r"exposure_bias\.lengths: .*\[500\]",
    ),
    "errors against nobody": (
        {"exposure_bias.max_prompts": 4, "model.teacher": None, "model.objectives": {"ce": "NextToken"}},
        r"exposure_bias\.max_prompts: 4, but there is no teacher",
    ),
    "a judge without an address": (judge(endpoint={**JUDGE, "base_url": "localhost"}), r"endpoint\.base_url: expected"),
    "a judge asked twice the same": (judge(seeds=[1, 1]), r"callbacks\[0\]\.init_args\.seeds: expected"),
    "a judge without workers": (judge(num_workers=0), r"init_args\.num_workers: expected at least 1, got 0"),
    "a judge without a key": (
        judge(endpoint={**JUDGE, "api_key_env": "NOT_SET"}, every_n_validations=1),
        r"trainer\.callbacks\[0\]\.init_args\.endpoint\.api_key_env: .*NOT_SET",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_value_that_cannot_be_is_refused_before_any_weights_load(refusal, case: str) -> None:
    changes, words = CASES[case]
    message = refusal(changes)
    assert re.search(words, message, re.DOTALL), message
