"""Makes a second tokenizer for the embedded tasks, and a small teacher that was trained with it: a teacher of another family.

Run: python tools/build_second_teacher.py FOLDER     (about three minutes on one core, no download)

It has fewer tokens than the embedded tokenizer, other ids and other special tokens, so words are cut in other places. Both
put a space before a text and split numbers into digits, as those of Qwen2.5 and SmolLM2 do: where one has whole numbers as
tokens (--whole_numbers), the answers are not aligned, and a student of the other learns nothing of them.

    FOLDER/tokenizer    the tokenizer, and the config of the untrained model
    FOLDER/teacher      the teacher as a Hugging Face folder: model.teacher.path
    FOLDER/runs         the log and the checkpoints of its training
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from build_embedded_tokenizer import training_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from lit_distill.cli.app import DistillCLI
from lit_distill.data.synthetic.data import CHAT_TEMPLATE

VOCABULARY = 448  # the embedded tokenizer has 512
PAD, EOS = "<|padding|>", "<|eot|>"  # the embedded tokenizer: <|pad|>, <|end|>
STEPS, QUICK_STEPS = 2000, 2
LONGEST = 256
"""Tokens that the teacher reads, and those of an item at most."""


def build_tokenizer(whole_numbers: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the text of the embedded tokenizer; the result is always the same.

    Args:
        whole_numbers: do not split numbers into digits.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = [] if whole_numbers else [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],  # in another order than the embedded ones, so that no special token has its id
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,  # writes a task as the training data do, and ends a turn with this tokenizer's EOS
    )


def save_untrained(folder: Path, whole_numbers: bool) -> None:
    """Write the tokenizer and the config of a Llama of the embedded teacher's size; the weights come from training."""
    tokenizer = build_tokenizer(whole_numbers)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        **ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(do_sample=False, max_new_tokens=64, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def training_arguments(untrained: Path, runs: Path, seed: int, quick: bool) -> list[str]:
    """The command line of `configs/embedded_teacher.yaml`, for another model and fewer steps."""
    steps = QUICK_STEPS if quick else STEPS
    settings: dict[str, object] = {
        "run_name": "second_teacher",
        "seed_everything": seed,
        "model.student.path": untrained,
        "model.student.from_scratch": "true",
        "model.objectives": "{next_token: NextToken}",
        "model.optimizer": "{class_path: AdamW, init_args: {lr: 2.0e-3, betas: [0.9, 0.98], weight_decay: 0.01}}",
        "model.lr_scheduler": "{class_path: WarmupCosine, init_args: {warmup_steps: 100, final_ratio: 0.02}}",
        "data": "ProceduralData",
        "data.num_train": 64 if quick else 60_000,
        "data.num_validation": 8 if quick else 300,
        "data.num_test": 8 if quick else 600,
        "trainer.default_root_dir": runs,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 1 if quick else steps // 4,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.gradient_clip_val": 1.0,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "generation": "{max_prompts: 300, max_new_tokens: 64}",
        "report.enabled": "false",
    }
    return ["fit", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def build(folder: Path, seed: int = 1, quick: bool = False, whole_numbers: bool = False) -> float:
    """Make tokenizer and teacher.

    Args:
        folder: where to write; see the description of this file.
        seed: seed of the weights. The tokenizer does not depend on it.
        quick: train for two steps, which tries the tool but makes no useful teacher.
        whole_numbers: of the tokenizer; see `build_tokenizer`.

    Returns:
        The teacher's exact match on the test tasks, in per cent.
    """
    untrained, runs, teacher = folder / "tokenizer", folder / "runs", folder / "teacher"
    save_untrained(untrained, whole_numbers)
    sys.argv = sys.argv[:1]  # Lightning warns if sys.argv has arguments and `args` is passed too
    cli = DistillCLI(training_arguments(untrained, runs, seed, quick))
    (scores,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    shutil.copytree(Path(cli.trainer.log_dir) / "export" / "last", teacher, dirs_exist_ok=True)
    return scores["test/exact_match"]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, build, and print where things are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; created if needed")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the teacher's weights and of the order of its data"
    )
    parser.add_argument("--quick", action="store_true", help="train for two steps only, to try the tool")
    parser.add_argument(
        "--whole_numbers", action="store_true", help="a tokenizer that does not split numbers into digits"
    )
    given = parser.parse_args(arguments)
    if (given.folder / "teacher").exists():
        sys.exit(f"error: {given.folder / 'teacher'} already exists. Give another folder, or remove it.")
    start = time.monotonic()
    exact_match = build(given.folder, given.seed, given.quick, given.whole_numbers)
    print(f"tokenizer  {given.folder / 'tokenizer'}")
    print(
        f"teacher    {given.folder / 'teacher'}     --model.teacher.init_args.teacher.path {given.folder / 'teacher'}"
    )
    print(f"exact match of the teacher on held-out tasks: {exact_match:.1f} % ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    main()
