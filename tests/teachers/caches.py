"""Teacher caches for tests: of a batch, without a Trainer, and of a data module, as `lit-distill cache` writes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import main, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from training import learner_of, weights

from lit_distill.cli.trainer import DistillTrainer
from lit_distill.data import ProceduralData
from lit_distill.functional import unpack_bits
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL
from lit_distill.teachers import CachedTeacher, FrozenTeacher
from lit_distill.teachers.cached import COUNT_BITS
from lit_distill.teachers.store import CacheSettings, Shards, texts_of
from lit_distill.teachers.writing import CacheOptions, CacheWriter, write_head
from lit_distill.types import Item, Sequences

SIZES: dict[str, Any] = {"num_train": 48, "num_validation": 10, "num_test": 4, "batch_size": 8, "eval_batch_size": 4}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
FORMS = ("hidden", "topk", "sampled")
ALL_SPLITS = ("train", "validation", "test")
Values = Mapping[tuple[int, int], Mapping[str, Tensor]]


def named(text: Sequences, *names: str) -> Sequences:
    """The same texts, as those of items."""
    return replace(text, items=tuple(map(Item, names or map(str, range(len(text))))))


def of_texts(
    folder: Path,
    teacher: FrozenTeacher,
    texts: Sequences,
    *more: Sequences,
    fields: Collection[str] = (),
    **options: Any,
) -> CachedTeacher:
    """The cache of a few batches, ready to answer."""
    chosen, head = CacheOptions(**options), teacher.lm.head()
    dtype = str(chosen.dtype or head.weight.dtype).removeprefix("torch.")
    settings = CacheSettings(
        form=chosen.form,
        vocabulary_size=len(head.weight),
        teacher="tiny",
        identity={},
        tokenizer="",
        data="3 items of train",
        dtype=dtype,
        hidden_size=head.weight.shape[1],
        top_k=chosen.top_k,
        num_draws=chosen.num_draws,
        scale=head.scale,
        softcap=head.softcap,
        complete=True,
    )
    settings = replace(settings, fields=list(fields))
    settings.write(folder)
    write_head(folder, head)
    writer = CacheWriter(folder, chosen, teacher, settings, 0)
    for batch in (texts, *more):
        writer.write(batch, writer.missing(batch))
    writer.flush()
    return CachedTeacher(str(folder)).load(None, None)


def tensors_of(folder: Path) -> list[dict[str, Tensor]]:
    """What lies in every shard."""
    return [load_file(file) for file in sorted((folder / "shards").glob("*"))]


def values_of(folder: Path) -> Values:
    """What is stored of every text, by its key; every text once."""
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for shard in tensors_of(folder):
        last = draws = 0
        for number, (key, count) in enumerate(zip(shard["keys"].tolist(), shard["num_rows"].tolist(), strict=True)):
            rows = slice(last, last := last + count)
            kept = {
                name: shard[name][rows]
                for name in ("hidden", "ids", "logprobs", "label_logprobs", "sizes")
                if name in shard
            }
            if "draws" in shard:
                kept["draws"] = shard["draws"][draws : (draws := int(shard["draw_ends"][number]))]
            assert tuple(key) not in found, "a text is stored twice"
            found[tuple(key)] = kept
    return found


def assert_same(one: Values, other: Values) -> None:
    """Whether two caches have the same texts and, but for rounding in the teacher's forward pass, the same values."""
    assert one.keys() == other.keys()
    num_draws = moved = 0
    for key, values in one.items():
        others = other[key]
        assert values.keys() == others.keys()
        if "draws" in values:  # a draw close to the end of a token's share may fall to the next token
            drawn, also = counts_of(values), counts_of(others)
            num_draws, moved = num_draws + int(drawn.sum()), moved + int((drawn - also).abs().sum()) // 2
        elif (
            "ids" in values
        ):  # a logarithm may round to the next bfloat16, and tokens of like probability may change places
            torch.testing.assert_close(values["logprobs"], others["logprobs"], rtol=2**-7, atol=0)
            torch.testing.assert_close(values["label_logprobs"], others["label_logprobs"], rtol=1e-5, atol=1e-5)
            assert (values["ids"] != others["ids"]).float().mean() < 0.02
        else:
            torch.testing.assert_close(values["hidden"], others["hidden"], rtol=1e-5, atol=1e-6)
    assert moved <= num_draws / 500


def counts_of(values: Mapping[str, Tensor]) -> Tensor:
    """How often each token was drawn in each row of a text, ``[n, V]``."""
    width = values["draws"].shape[1]
    drawn = unpack_bits(values["draws"], 1, 8 * width)[:, 0]
    rows = torch.arange(len(values["sizes"])).repeat_interleave(values["sizes"].long())
    counts = torch.zeros(len(values["sizes"]), 2 ** (8 * width - COUNT_BITS), dtype=torch.int64)
    counts[rows, drawn >> COUNT_BITS] = drawn & (2**COUNT_BITS - 1)
    return counts


def num_texts(folder: Path) -> int:
    return len(Shards(folder))


def keys_of(texts: Sequences) -> list[tuple[int, int]]:
    return [text.key for text in texts_of(texts)]


def distinct_teacher(path: Path, into: Path) -> Path:
    """A copy of a random model whose predictions are far from uniform, so that divergences from it are large."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 40
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(path).save_pretrained(into)
    return into


def every_form(pair: tuple[Path, Path], folder: Path) -> dict[str, Path]:
    """A cache of each form, of all splits."""
    return {form: cache(live(pair), folder / form, form=form, splits=ALL_SPLITS) for form in FORMS}


def weights_of(cli: Any) -> Tensor:
    """The weights that a run of the command line has learnt."""
    return weights(cli.model)


def config_of(pair: tuple[Path, Path], teacher: Any = None, **model: Any) -> dict[str, Any]:
    """A config that trains with another teacher than that of the pair, by plain gradient descent, and exports nothing."""
    config = tiny_config(pair, **model)
    config["model"]["optimizer"] = {"class_path": "SGD", "init_args": {"lr": 0.1}}
    config["export"] = {"enabled": False}
    if teacher is not None:
        config["model"]["teacher"] = teacher
    return config


def cached(folder: Path, **settings: Any) -> dict[str, Any]:
    """The YAML of a cached teacher."""
    return {"class_path": "CachedTeacher", "init_args": {"path": str(folder), **settings}}


def refusal(*arguments: object) -> str:
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert isinstance(stop.value.code, str), stop.value.code
    return stop.value.code


def small_data(**settings: Any) -> ProceduralData:
    return ProceduralData(**{**SIZES, **settings})


def cache(module: DistillationModule, folder: Path, data: Any = None, form: str = "hidden", **settings: Any) -> Path:
    """Write the cache of a data module, by default a small one, as the command does; by default without the test split."""
    settings = {"splits": ("train", "validation"), **settings}
    DistillTrainer(**QUIET).cache(module, data or small_data(), path=str(folder), form=form, **settings)
    return folder


def live(pair: tuple[Path, Path], **settings: Any) -> DistillationModule:
    """A module whose teacher is the model itself."""
    return learner_of(pair, settings.pop("objectives", None) or {"kd": ForwardKL()}, **settings)


def from_cache(student: Path, folder: Path, tail: Any = "spread", **settings: Any) -> DistillationModule:
    """A module whose teacher is a cache."""
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    objectives = settings.pop("objectives", None) or {"kd": ForwardKL()}
    return DistillationModule(
        ModelSpec(str(student)), objectives, CachedTeacher(str(folder), tail), **{**sgd, **settings}
    )
