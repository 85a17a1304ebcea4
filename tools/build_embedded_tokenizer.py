"""Builds the tokenizer of the embedded teacher and student: a byte-level BPE of 512 tokens, trained on generated text.

Run: python tools/build_embedded_tokenizer.py [--output FOLDER ...]

The output is always the same, byte for byte: the text comes from a fixed seed. The models shipped in `lit_distill/assets` depend
on the token ids, so they have to be trained again after a change of this tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_distill.data.synthetic.data import TEMPLATE
from lit_distill.data.synthetic.tasks import generate_corpus, generate_instructions

ASSETS = Path(__file__).parents[1] / "lit_distill" / "assets"
VOCABULARY = 512
PAD, EOS = "<|pad|>", "<|end|>"
SEED = 20260101  # different from the seeds of the data; any seed would work


def training_text() -> Iterator[str]:
    """Prompts and responses in the format given to the models, and the corpus."""
    for record in generate_instructions(SEED, 20_000):
        yield TEMPLATE.format(**record)
        yield record["output"]
    yield from generate_corpus(SEED, 5_000)


def build() -> PreTrainedTokenizerFast:
    """Train the tokenizer: any text round-trips, each digit is one token, padding and end have their own tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.normalizer = normalizers.Prepend(
        " "
    )  # a word has the same tokens at any position, also at the start of a response
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
