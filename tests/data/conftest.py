"""A tiny byte-level BPE tokenizer, made here, with and without BOS and chat template; a cache of each test's own."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOS, BOS = "<eos>", "<bos>"
SPECIAL = [EOS, BOS, "<user>", "<assistant>"]
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    datasets.disable_progress_bars()
    return folder


@pytest.fixture(scope="session")
def backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "name a colour", "red green blue"] * 3, trainer)
    return tokenizer.to_str()


def wrap_backend(backend: str, **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token=EOS, **options)


@pytest.fixture
def wrapped():
    """Makes a tokenizer of `backend`; keyword arguments go to it."""
    return wrap_backend


@pytest.fixture
def tokenizer(backend) -> PreTrainedTokenizerFast:
    """No BOS, and padding is EOS, as with many base models."""
    return wrap_backend(backend, pad_token=EOS)


@pytest.fixture
def bos_tokenizer(backend) -> PreTrainedTokenizerFast:
    """Puts BOS before and EOS behind every text, as Llama's can."""
    raw = Tokenizer.from_str(backend)
    specials = [(token, raw.token_to_id(token)) for token in ("<bos>", "<eos>")]
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=specials)
    return wrap_backend(raw.to_str(), bos_token=BOS)


@pytest.fixture
def chat_tokenizer(backend) -> PreTrainedTokenizerFast:
    return wrap_backend(backend, pad_token=EOS, chat_template=CHAT)


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows to a file, one a line; text is written as it is."""

    def write(rows, name="train.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def items():
    """``count`` items of different lengths, all different."""

    def make(count: int) -> list[dict[str, str]]:
        return [
            {"instruction": f"Say {n}.", "input": "the cat " * (n % 7), "output": "red " * (n % 5) + str(n)}
            for n in range(count)
        ]

    return make
