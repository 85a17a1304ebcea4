"""What the ranks hold is what the formula says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "memory.py"


@pytest.mark.slow
def test_each_of_two_ranks_holds_what_the_formula_says() -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--measure", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    apart, together = done.stdout.splitlines()
    assert "tensor parallel" in together
    for line in (apart, together):
        shards, expected_shards, gathered, expected_gathered, *_ = map(float, re.findall(r"\d+\.\d+", line))
        assert shards == pytest.approx(expected_shards, rel=0.002)
        assert gathered == pytest.approx(expected_gathered, rel=0.03 if line is together else 0.002)


def test_the_paper_calculation_knows_the_published_sizes(capsys) -> None:
    spec = importlib.util.spec_from_file_location("memory", SCRIPT)
    tool = importlib.util.module_from_spec(spec)
    sys.modules["memory"] = tool
    spec.loader.exec_module(tool)
    published = {"Qwen2.5 7B -> 0.5B": (7.616e9, 0.494e9), "Llama 3.1 70B -> 8B": (70.554e9, 8.030e9)}
    for name, sizes in published.items():
        for config, size in zip(tool.PAIRS[name], sizes, strict=True):
            assert tool.Groups.of(config).total == pytest.approx(size, rel=0.001)
    tool.main([])
    totals = [float(total) for total in re.findall(r"= (\d+\.\d)", capsys.readouterr().out)]
    assert len(totals) == 4
    assert max(totals) < 80
    tool.main(["--reference"])
    with_reference = [float(total) for total in re.findall(r"= (\d+\.\d)", capsys.readouterr().out)]
    a_reference = 2 * 8.030 / 8  # GB of shards of one more model of 8B on 8 GPUs
    assert with_reference[3] - totals[3] == pytest.approx(a_reference, abs=0.06)
    assert with_reference[2] - totals[2] == pytest.approx(
        a_reference + 2 * 128256 * 4096 / 1e9, abs=0.06
    )  # and its head


def test_the_size_of_a_cache_is_counted_from_its_bits(capsys) -> None:
    spec = importlib.util.spec_from_file_location("memory", SCRIPT)
    tool = importlib.util.module_from_spec(spec)
    sys.modules["memory"] = tool
    spec.loader.exec_module(tool)
    tool.main(["--cache", "1_000_000"])
    shown = capsys.readouterr().out
    bits = 18  # of 152,064 ids
    assert "hidden: 7,168 bytes a token, 7.2 GB on the disk; 1.1 GB in memory" in shown
    assert f"topk: {64 * bits // 8 + 2 * 64 + 4} bytes a token" in shown
    assert f"sampled: at most {50 * 3 + 1} bytes a token" in shown
