"""Builds the tokenizer of the embedded teacher and student: a byte-level BPE of 512 tokens, trained on generated text.

Run: python tools/build_embedded_tokenizer.py [--output FOLDER ...]

Always gives the same bytes: the text comes from a seed and the merges from its counts. The models shipped in `lit_distill/assets`
know their tokens by number, so after a change of this tokenizer they have to be trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_distill.data.procedural import generate_corpus, generate_instructions
from lit_distill.data.procedural_data import TEMPLATE

ASSETS = Path(__file__).parents[1] / "lit_distill" / "assets"
VOCABULARY = 512
PAD, EOS = "<|pad|>", "<|end|>"
SEED = 20260101  # apart from the seeds of the data, though any would do


def training_text() -> Iterator[str]:
    """Prompts and responses as the models see them, and the corpus."""
    for record in generate_instructions(SEED, 20_000):
        yield TEMPLATE.format(**record)
        yield record["output"]
    yield from generate_corpus(SEED, 5_000)


def build() -> PreTrainedTokenizerFast:
    """The trained tokenizer: any text round-trips, digits stay apart, padding and end are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.normalizer = normalizers.Prepend(" ")  # a word is one token wherever it stands, also first in a response
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the generated text gives {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Builds the tokenizer and saves it beside every embedded model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, nargs="+", default=[ASSETS / "teacher", ASSETS / "student"])
    arguments = parser.parse_args()
    tokenizer = build()
    for folder in arguments.output:
        tokenizer.save_pretrained(folder)
        print(f"{len(tokenizer)} tokens -> {folder}")


if __name__ == "__main__":
    main()
