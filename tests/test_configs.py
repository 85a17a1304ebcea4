"""Every shipped YAML parses, instantiates, takes a step, refuses a typo, and names models of the size it says."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import yaml
from command_line import main, run
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config

from lit_distill.cli.app import DistillCLI
from lit_distill.data.tokenize import TEMPLATES
from lit_distill.models import ModelSpec, load_model
from lit_distill.objectives import ReverseKL
from lit_distill.optim import WarmupCosine
from lit_distill.teachers import LocalTeacher, load_models, local

# Lightning 2.6 calls what jsonargparse 4.5x deprecates
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

FOLDER = Path(__file__).parents[1] / "configs"
CACHED = (
    FOLDER / "cached_teacher.yaml"
)  # cannot be instantiated before its cache is written, so it has a test of its own
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path != CACHED)
KD, SEQKD = (next(path for path in CONFIGS if path.stem == stem) for stem in ("smollm2_kd", "seqkd_smollm2"))
MISSPELT = ("quickstart", "minillm_gpt2", "smollm2_lora")
"""Of these, typos are looked for by default: a short config, one with rollouts and a corpus, one with adapters."""


def smollm2(hidden: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        tie_word_embeddings=True,
    )


SMOLLM2_135M = smollm2(576, 1536, 30, 9)
SMOLLM2_PRUNED = smollm2(576, 1536, 25, 9)
SMOLLM2_LAYER = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
SMOLLM2_360M = smollm2(960, 2560, 32, 15)
QWEN_HALF = Qwen2Config(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QWEN_SEVEN = Qwen2Config(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


def opt(hidden: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=50_272,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


TOKENS = {QWEN_HALF.vocab_size: 151_665, 50_272: 50_265}  # of the tokenizers whose heads have more rows
GPT2_XL = GPT2Config(n_layer=48, n_embd=1600, n_head=25)
SMOLLM2_FOLDER = "~/.cache/lit_distill/SmolLM2-135M-Instruct"

# path in a YAML -> its shape as published, and how many parameters the model cards count
PUBLISHED: dict[str, tuple[PreTrainedConfig, int]] = {
    "openai-community/gpt2": (GPT2Config(), 124_439_808),
    "openai-community/gpt2-xl": (GPT2_XL, 1_557_611_200),
    "runs/gpt2_sft/version_0/export/best": (GPT2Config(), 124_439_808),
    "runs/gpt2_xl_sft/version_0/export/best": (GPT2_XL, 1_557_611_200),
    "runs/gpt2_init/version_0/export/best": (GPT2Config(), 124_439_808),
    "runs/opt_1.3b_sft/version_0/export/best": (opt(2048, 24, 32), 1_315_758_080),
    "runs/opt_13b_sft/version_0/export/best": (opt(5120, 40, 40), 12_853_473_280),
    "HuggingFaceTB/SmolLM2-135M": (SMOLLM2_135M, 134_515_008),
    "HuggingFaceTB/SmolLM2-360M": (SMOLLM2_360M, 361_821_120),
    SMOLLM2_FOLDER: (SMOLLM2_135M, 134_515_008),
    "runs/smollm2_kd/version_0/export/best": (SMOLLM2_PRUNED, 134_515_008 - 5 * SMOLLM2_LAYER),
    "Qwen/Qwen2.5-0.5B-Instruct": (QWEN_HALF, 494_032_768),
    "Qwen/Qwen2.5-7B-Instruct": (QWEN_SEVEN, 7_615_616_512),
}

# keys that decide how long a step takes, wherever they stand in a YAML, and what the test sets them to
SMALL = {
    "batch_size": 4,
    "eval_batch_size": 4,
    "micro_batch_size": 2,
    "mini_batch_size": 2,
    "max_new_tokens": 4,
    "max_prompts": 2,
    "num_workers": 0,
    "num_train": 24,
    "num_validation": 4,
    "num_test": 4,
    "validation_size": 4,
    "drop_layers": None,
    "keep_layers": None,
    "split": "train",
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Path:
    """One shipped YAML after the other."""
    return request.param


@cache
def instantiated(path: Path) -> DistillCLI:
    """Everything that a YAML stands for; to be looked at, not to be changed."""
    return run("--config", path, run=False)


def kind(path: Path) -> tuple[object, ...]:
    """What decides most about the code that a step of a YAML runs: its source and its adapters."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = content["model"]
    return (model.get("source") or {}).get("class_path"), "lora" in model["student"]


def models(path: Path) -> str:
    """Student and teacher of a YAML, as they stand there: what many of them have is looked at once."""
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    return json.dumps([model["student"], model.get("teacher")])


def head(path: Path) -> str:
    """The comment that a YAML opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(takewhile(lambda line: line.startswith("#"), lines))


def commands(path: Path) -> list[list[str]]:
    """The arguments of every ``lit-distill`` that the head of a YAML shows."""
    text = re.sub(r"\\\n# *", "", head(path))
    shown = [shlex.split(line[1:], comments=True) for line in text.splitlines() if line[1:].strip().startswith("lit-")]
    return [words[1:] for words in shown]


def levels(node: Any, way: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every mapping of a YAML whose keys are not names of the user's own."""
    if isinstance(node, dict) and not {"objectives", "corpus_objectives", "others"} & {*way[-1:]}:
        yield way
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from levels(child, (*way, key))


def at(node: Any, way: tuple[str | int, ...]) -> Any:
    for key in way:
        node = node[key]
    return node


def shrink(node: Any) -> Any:
    """The same YAML with the values of `SMALL`."""
    if isinstance(node, list):
        return [shrink(child) for child in node]
    if isinstance(node, dict):
        return {key: SMALL.get(key, shrink(child)) for key, child in node.items()}
    return node


@pytest.fixture
def stand_ins(pair, tmp_path) -> Callable[[Path], Path]:
    """Writes a YAML again, with tiny models, records and texts of this test's own."""
    records = tmp_path / "records.jsonl"
    record = {
        "instruction": "Say",
        "context": "the cat",
        "input": "",
        "output": "red",
        "response": "red",
        "prompt": "Say",
    }
    records.write_text("".join(json.dumps({**record, "instruction": f"Say {n}"}) + "\n" for n in range(24)))
    (tmp_path / "corpus.txt").write_text("Tom is a red cat.\n\n" * 200)

    def write(path: Path) -> Path:
        small = shrink(yaml.safe_load(path.read_text(encoding="utf-8")))
        for role, folder in zip(("student", "teacher"), pair, strict=True):
            if role in small["model"]:
                described = small["model"][role]
                if "class_path" in described:  # a teacher that has another one as its part
                    described["init_args"]["teacher"] |= {"path": str(folder), "tokenizer": None}
                else:
                    small["model"][role] = {**described, "path": str(folder), "tokenizer": None}
        data = small["data"].setdefault("init_args", {})
        for split in {"train", "validation", "test", "predict"} & data.keys():
            data[split]["path"] = str(records)
        if "path" in data.get("corpus", {}):
            data["corpus"] = {"path": str(tmp_path / "corpus.txt"), "length": 16, "batch_size": 8}
        if data.get("template") == "chat":
            data["template"] = "{instruction} {input}"
        for callback in small["trainer"].get("callbacks", []):
            others = callback.get("init_args", {}).get("others", {})
            others |= dict.fromkeys(others, str(pair[0]))
        small["trainer"] |= {
            "max_steps": 1,
            "max_epochs": None,
            "limit_val_batches": 1,
            "val_check_interval": 1,
            "precision": "32-true",
            "accelerator": "cpu",
            "strategy": "auto",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "runs"),
        }
        written = tmp_path / path.name
        written.write_text(yaml.safe_dump(small))
        return written

    return write


def test_the_head_of_a_config_gives_the_command_that_runs_it(config: Path) -> None:
    assert f"lit-distill fit --config configs/{config.name}" in head(config)


@pytest.mark.slow
def test_every_command_in_the_head_of_a_config_parses(config: Path) -> None:
    shown = commands(config)
    parser = instantiated(config).parser
    for stage, flag, path, *overrides in shown:
        assert stage in ("fit", "predict", "test")
        assert flag == "--config"
        if overrides:  # a command without is that of another config, which has these tests of its own
            parser.parse_args(["--config", str(config.with_name(Path(path).name)), *overrides])
        else:
            assert config.with_name(Path(path).name).is_file()


def test_a_config_parses_and_instantiates(config: Path) -> None:
    cli = instantiated(config)
    assert cli.model.objectives
    assert cli.datamodule is not None
    assert cli.trainer.max_steps > 0 or cli.trainer.max_epochs is not None


@pytest.mark.parametrize(
    "config",
    {kind(path): path for path in reversed(CONFIGS) if path.stem != "qwen2.5_served"}.values(),  # there is no server
    ids=lambda path: path.stem,
)
def test_a_config_takes_one_step_and_exports_a_student(config: Path, stand_ins, tmp_path) -> None:
    main("fit", "--config", stand_ins(config))
    run = tmp_path / "runs" / config.stem / "version_0"
    losses = [line for line in (run / "metrics.csv").read_text().splitlines() if line]
    assert "train/loss" in losses[0]
    assert "val/perplexity" in losses[0]
    assert (run / "export" / "last" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("config", [path for path in CONFIGS if path.stem in MISSPELT], ids=lambda path: path.stem)
def test_a_typo_at_any_level_of_a_config_is_an_error_that_names_it(config: Path, tmp_path, capsys) -> None:
    written = tmp_path / "typo.yaml"
    parser = instantiated(config).parser
    unnamed = {}
    for way in levels(yaml.safe_load(config.read_text(encoding="utf-8"))):
        broken = yaml.safe_load(config.read_text(encoding="utf-8"))
        at(broken, way)["lerning_rate"] = "1"
        written.write_text(yaml.safe_dump(broken))
        with pytest.raises((SystemExit, ValueError)) as error:
            parser.instantiate_classes(parser.parse_args(["--config", str(written)]))
        said = capsys.readouterr().err + str(error.value)
        if "lerning_rate" not in said:
            unnamed[".".join(map(str, way))] = said
    assert not unnamed


@pytest.fixture
def published(tmp_path, monkeypatch) -> None:
    """A hub that knows configs and nothing else, and folders with nothing but theirs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shapes = {path: shape for path, (shape, _) in PUBLISHED.items()}
    for path in [path for path in shapes if path.startswith(("~", "runs"))]:
        folder = Path(path).expanduser().resolve()
        folder.mkdir(parents=True)
        shapes[str(folder)] = shapes[path]
        shapes[path].save_pretrained(folder)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda location, **_: copy.deepcopy(shapes[location]))
    monkeypatch.setattr(GenerationConfig, "from_pretrained", lambda *_, **__: GenerationConfig())


@pytest.mark.parametrize("path", PUBLISHED)
def test_the_shapes_of_these_tests_count_as_many_parameters_as_the_model_cards(published, path: str) -> None:
    with torch.device("meta"):
        assert load_model(ModelSpec(path), "model.student").num_parameters() == PUBLISHED[path][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", {models(path): path for path in reversed(CONFIGS)}.values(), ids=lambda path: path.stem
)
def test_student_and_teacher_of_a_config_fit_each_other_at_full_size(config: Path, published, monkeypatch) -> None:
    module = instantiated(config).model
    specs = [spec for spec in (module.student_spec, module.teacher_spec) if spec is not None]
    if not all(spec.path in PUBLISHED for spec in specs):
        own = ("assets", "runs/")  # embedded, or made from what is embedded
        assert all(any(name in spec.path for name in own) or spec.from_scratch for spec in specs), "add to PUBLISHED"
        return
    rows = PUBLISHED[specs[0].path][0].vocab_size
    tokens = TOKENS.get(rows, rows)
    words = SimpleNamespace(
        get_vocab=lambda: {str(n): n for n in range(tokens)},
        **dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"), "0"),
        eos_token_id=0,
    )
    monkeypatch.setattr(local, "load_tokenizer", lambda *_: words)
    with torch.device("meta"):
        frozen = {"teacher": LocalTeacher(specs[1])} if len(specs) == 2 else {}
        student, loaded = load_models(specs[0], frozen, words)
    teacher = loaded.get("teacher")
    assert student.vocabulary_size == (tokens if teacher else rows)
    assert student.head().weight.shape[0] == student.vocabulary_size
    if teacher is not None:
        assert teacher.head().weight.shape[0] == tokens
        assert student.model.num_parameters() < teacher.lm.model.num_parameters()


def test_the_pruned_smollm2_has_25_of_30_layers(published) -> None:
    with torch.device("meta"):
        student = load_model(instantiated(KD).model.student_spec, "model.student")
    assert student.config.num_hidden_layers == 25
    assert student.num_parameters() == 134_515_008 - 5 * SMOLLM2_LAYER


@pytest.mark.parametrize(
    ("name", "rate", "epochs"), [("gpt2_sft", 5e-4, 20), ("gpt2_kd", 5e-4, 20), ("gpt2_xl_sft", 5e-5, 10)]
)
def test_the_baselines_have_the_numbers_of_minillm(name: str, rate: float, epochs: int) -> None:
    cli = instantiated(KD.with_name(f"{name}.yaml"))
    optimizer = cli.model.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    schedule = cli.model.lr_scheduler_factory(optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 1e-2
    assert optimizer.defaults["lr"] == rate
    assert isinstance(schedule, WarmupCosine)
    assert schedule.warmup_steps == 0
    assert rate * schedule.final_ratio == pytest.approx(1e-7)
    assert cli.trainer.max_epochs == epochs
    assert cli.trainer.gradient_clip_val == 1.0
    data = cli.datamodule
    assert (data.batch_size, data.limits.max_prompt_length, data.limits.max_length) == (32, 256, 512)
    assert (data.validation_size, data.template, TEMPLATES["instruction"]) == (1000, None, "alpaca")
    weights = {type(objective).__name__: objective.weight for objective in cli.model.objectives.values()}
    assert weights == ({"ForwardKL": 0.5, "NextToken": 0.5} if name == "gpt2_kd" else {"NextToken": 1.0})


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "batch", "objectives", "corpus"),
    [
        ("seqkd_gpt2", 5e-4, 20, 32, {"NextToken": 1.0}, {}),
        ("gkd_gpt2", 5e-4, 20, 32, {"JensenShannon": 1.0}, {}),
        ("distillm_gpt2", 5e-4, 20, 32, {"SkewForwardKL": 1.0}, {"NextToken": 1.0}),
        ("dpkd_gpt2", 5e-4, 20, 8, {"DirectPreference": 0.5, "NextToken": 0.5}, {"NextToken": 0.5}),
        (
            "dpkd_token_gpt2",
            5e-4,
            20,
            8,
            {"TokenPreference": 0.5, "NextToken": 0.5},
            {"NextToken": 0.25, "ForwardKL": 0.25},
        ),
        ("dpkd_opt", 5e-5, 10, 32, {"DirectPreference": 0.5, "NextToken": 0.5}, {"NextToken": 0.5}),
    ],
)
def test_the_other_methods_have_the_numbers_of_their_scripts(
    name: str, rate: float, epochs: int, batch: int, objectives: dict[str, float], corpus: dict[str, float]
) -> None:
    cli = instantiated(KD.with_name(f"{name}.yaml"))
    module, data = cli.model, cli.datamodule
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    schedule = module.lr_scheduler_factory(optimizer)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (rate, 1e-2)
    assert isinstance(schedule, WarmupCosine)
    assert schedule.warmup_steps == 0
    assert rate * schedule.final_ratio == pytest.approx(1e-7)
    assert (cli.trainer.max_epochs, cli.trainer.gradient_clip_val) == (epochs, 1.0)
    assert (data.limits.max_prompt_length, data.limits.max_length) == (256, 512)
    assert (getattr(module.source, "mini_batch_size", None) or data.batch_size) == batch
    for given, terms in ((objectives, module.objectives), (corpus, module.corpus_objectives)):
        assert {type(objective).__name__: objective.weight for objective in terms.values()} == given
    if corpus:  # as many rows of plain text as responses
        assert (data.corpus.length, data.corpus.batch_size) == (512, data.batch_size)
    if (sampling := getattr(module.source, "sampling", None)) is not None:
        assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (256, 1.0, 0, 1.0)


def test_preference_jsd_and_replay_have_the_settings_of_the_papers_and_their_code() -> None:
    dpkd, token, gkd, distillm = (
        instantiated(KD.with_name(f"{name}_gpt2.yaml")).model for name in ("dpkd", "dpkd_token", "gkd", "distillm")
    )
    preference = dpkd.objectives["dpkd"]
    assert (preference.beta, preference.variant, preference.length_normalize) == (0.1, "dpkd", True)
    assert (token.objectives["dpkd"].beta, token.objectives["dpkd"].variant) == (0.1, "dpkd")
    assert (gkd.objectives["jsd"].beta, gkd.source.on_policy_fraction) == (pytest.approx(1 - 0.9), 0.5)
    assert distillm.objectives["skl"].skew == 0.1
    replay = distillm.source
    assert (replay.probability, replay.increment, replay.tolerance, replay.capacity) == (0.0, 0.1, 0.1, 1000)
    assert replay.replay_schedule == "decreasing"


def test_the_overrides_in_the_heads_do_what_they_say() -> None:
    overrides = ("--data.train.path", "my.jsonl", "--data.fields", "null", "--model.objectives.kd", "ReverseKL")
    cli = run("--config", KD, *overrides, run=False)
    assert cli.datamodule.records["train"].path == "my.jsonl"
    assert cli.datamodule.fields.columns["output"] == "output"
    assert isinstance(cli.model.objectives["kd"], ReverseKL)
    assert cli.model.objectives["ce"].weight == instantiated(KD).model.objectives["ce"].weight


def test_what_the_teacher_says_is_what_seqkd_learns(stand_ins, tmp_path) -> None:
    said = tmp_path / "said.jsonl"
    speak = ("--model.prediction.model", "teacher", "--model.prediction.path", said)
    main("predict", "--config", stand_ins(KD), *speak, "--model.prediction.max_new_tokens", 4)
    responses = [json.loads(line)["response"] for line in said.read_text().splitlines()]
    assert len(responses) == 20  # four of 24 are for validation
    main("fit", "--config", stand_ins(SEQKD), "--data.train.path", said)
    assert (tmp_path / "runs" / SEQKD.stem / "version_0" / "export" / "best" / "config.json").is_file()


@pytest.mark.slow
def test_the_commands_of_the_cached_teacher_run_one_after_the_other(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "lit_distill"):
        (tmp_path / name).symlink_to(FOLDER.parent / name)
    small = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--data.validation_size", 8)
    more = {"predict": ("--data.num_train", 40), "cache": ("--data.validation_size", 8), "fit": small, "test": ()}
    shown = commands(CACHED)
    assert [stage for stage, *_ in shown] == ["predict", "cache", "fit", "test"]
    for command in shown[:-1]:
        main(*command, *more[command[0]])
    assert (tmp_path / "runs" / "cached_teacher" / "version_0" / "export" / "last" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_student_without_teacher_is_what_its_config_makes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(CONFIGS[0].parents[1])
    settings = ("--trainer.max_steps", 50, "--trainer.default_root_dir", tmp_path, "--trainer.callbacks", "[]")
    main("fit", "--config", "configs/without_teacher_quickstart.yaml", *settings)
    made = tmp_path / "without_teacher_quickstart" / "version_0" / "export" / "best"
    assets = Path("lit_distill/assets")
    before, shipped, own = (flat_weights(f) for f in (assets / "student", assets / "student_without_teacher", made))
    assert float((own - shipped).norm() / (shipped - before).norm()) < 0.05  # rounding differs between processors


def flat_weights(folder: Path) -> torch.Tensor:
    return torch.cat([weight.flatten() for _, weight in sorted(load_file(folder / "model.safetensors").items())])
