"""The second teacher is a Hugging Face folder whose tokenizer differs from the embedded one, but can be aligned with it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny import ASSETS
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_distill.data.special_tokens import turn_end
from lit_distill.data.synthetic.tasks import generate_instructions
from lit_distill.teachers.alignment import Coverage, adds_space, align, end_tokens, shared_tokens, token_bytes

TOOLS = Path(__file__).parents[2] / "tools"
RESPONSES = [task["output"] for task in generate_instructions(0, 200, "test")]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("build_second_teacher")


def test_the_folder_loads_and_the_teacher_ends_a_turn_with_its_own_token(tool, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["build_second_teacher.py"])
    tool.main([str(tmp_path / "second"), "--quick"])
    assert "exact match of the teacher on held-out tasks: " in capsys.readouterr().out
    folder = tmp_path / "second" / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Sort the words.\nred cat\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert tokenizer.eos_token == tool.EOS
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert turn_end(tokenizer) == [tokenizer.eos_token_id]
    with pytest.raises(SystemExit, match="already exists"):
        tool.main([str(tmp_path / "second"), "--quick"])


@pytest.mark.parametrize(("whole_numbers", "least", "most"), [(False, 0.9, 0.97), (True, 0.7, 0.9)])
def test_most_tokens_of_the_embedded_tokenizer_are_aligned_but_not_all(tool, whole_numbers, least, most) -> None:
    pair = AutoTokenizer.from_pretrained(ASSETS / "student"), tool.build_tokenizer(whole_numbers)
    tables = [token_bytes(tokenizer) for tokenizer in pair]
    spaces = tuple(adds_space(tokenizer, table) for tokenizer, table in zip(pair, tables, strict=True))
    coverage = Coverage()
    for text in RESPONSES:
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for tokenizer in pair]
        coverage.add(align(*ids, *tables, end_tokens(*pair), spaces), ids[0])
    assert least < coverage.share < most
    assert 400 < len(shared_tokens(*pair).student_ids) < 448
