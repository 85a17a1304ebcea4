"""Measures the data pipeline: batches without padding against padded ones, and tokenising many conversations.

Run: python tools/data_benchmark.py padding                       (a minute on two cores)
     python tools/data_benchmark.py tokenize --records 50000      (some minutes; against `datasets.map` alone)
     python tools/data_benchmark.py memory --records 10000 200000 (peak memory and seconds, cold and from the cache)

`padding` draws lengths log-normally from 32 to 512 tokens and runs forward and backward of a Llama of 11 M parameters on the same
batches, alternating. `tokenize` reads, renders and tokenises conversations of three turns, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.memory import MemorySampler

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZER = str(Path(__file__).parents[1] / "lit_distill/assets/student")


def padding(steps: int, texts: int) -> None:
    """Print padding and speed of both ways."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lit_distill.models import CausalLM
    from lit_distill.models.packing import check_packing
    from lit_distill.types import Sequences

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    lm = CausalLM(AutoModelForCausalLM.from_config(config))
    check_packing(lm, "student", torch.device("cpu"))
    way = lm.packs
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    tokens, slots = 0, {"padded": 0, "packed": 0}
    for _ in range(steps):
        sizes = torch.randn(texts, generator=generator).mul(0.7).add(4.85).exp().clamp(32, 512).long()
        columns = torch.arange(int(sizes.max()))
        mask = (columns < sizes[:, None]).long()
        ids = torch.randint(0, 512, mask.shape, generator=generator) * mask
        tokens += int(sizes.sum())
        for name, packs in (("padded", None), ("packed", way)):
            batch = Sequences(ids, mask, mask.bool() & (columns > 0))
            lm.packs = packs
            begin = time.perf_counter()
            lm.target_rows(batch).square().mean().backward()
            seconds[name].append(time.perf_counter() - begin)
            used = batch.packed.input_ids if packs and batch.packed else ids
            slots[name] += used.numel()
            lm.zero_grad()
    for name, each in seconds.items():
        share = 1 - tokens / slots[name]
        print(f"{name}: {share:6.1%} padding, {tokens / sum(each):8.0f} tokens/s")
    ratio = statistics.median(p / q for p, q in zip(seconds["padded"], seconds["packed"], strict=True))
    print(f"packed against padded, median of {steps} alternating steps: {ratio:.2f} x")


def write_conversations(path: Path, count: int) -> None:
    """Conversations of three turns with some 150 words."""
    draw = random.Random(0)
    words = [f"word{n}" for n in range(1000)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = []
            for _ in range(3):
                turns.append({"role": "user", "content": " ".join(draw.choices(words, k=draw.randint(5, 40)))})
                turns.append({"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(5, 60)))})
            file.write(json.dumps({"messages": turns}) + "\n")


def ours(path: str) -> int:
    """Tokenise with masks of all turns; returns the number of items."""
    from lit_distill.data import InstructionData, Records

    data = InstructionData(
        Records(path), tokenizer=TOKENIZER, chat_template=TEMPLATE, max_length=4096, max_prompt_length=4000
    )
    data.prepare_data()
    data.setup("fit")
    next(iter(data.train_dataloader()))
    return data.num_items("train")


def theirs(path: str) -> int:
    """`datasets.map` alone: the chat template and the tokenizer, without masks."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = TEMPLATE

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in batch["messages"]]
        return tokenizer(texts, add_special_tokens=False)

    rows = datasets.load_dataset("json", data_files=path, split="train")
    return len(rows.map(tokenize, batched=True, remove_columns=rows.column_names))


WAYS: dict[str, Callable[[str], int]] = {"ours": ours, "datasets.map": theirs}


def measured(way: str, path: Path, cache: Path) -> tuple[float, float]:
    """Seconds and peak memory (GB, without mapped files) of a process of its own."""
    command = [sys.executable, __file__, "one", "--way", way, "--path", str(path)]
    environment = {"HF_DATASETS_CACHE": str(cache), "PATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def one(way: str, path: str) -> None:
    """Run one way here, and print seconds and peak memory."""
    begin = time.perf_counter()
    with MemorySampler(every=0.02) as memory:
        WAYS[way](path)
    print(time.perf_counter() - begin, memory.most / 1e9)


def tokenize(records: int) -> None:
    """Print the seconds of both ways."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "talk.jsonl"
        write_conversations(path, records)
        for way in WAYS:
            for cold in ("cold", "from the cache"):
                seconds, memory = measured(way, path, Path(folder) / way)
                print(f"{way}, {records:,} conversations, {cold}: {seconds:.1f} s, {memory:.2f} GB at most")


def memory(counts: list[int]) -> None:
    """Print seconds and peak memory for several numbers of records."""
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "talk.jsonl"
            write_conversations(path, count)
            for cold in ("cold", "from the cache"):
                seconds, peak = measured("ours", path, Path(folder) / "cache")
                print(f"{count:,} records, {cold}: {seconds:.1f} s, {peak:.2f} GB at most")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["padding", "tokenize", "memory", "one"], help="what to measure")
    parser.add_argument("--records", type=int, nargs="+", default=[50_000], help="numbers of conversations")
    parser.add_argument("--steps", type=int, default=12, help="steps of `padding`")
    parser.add_argument("--texts", type=int, default=32, help="texts of a batch of `padding`")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "padding":
        padding(given.steps, given.texts)
    elif given.what == "tokenize":
        tokenize(given.records[0])
    elif given.what == "memory":
        memory(given.records)
    else:
        one(given.way, given.path)


if __name__ == "__main__":
    main()
