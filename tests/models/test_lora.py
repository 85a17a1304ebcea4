"""Adapters compute, learn, save and switch off as peft's own model does, through the chunked head too."""

from __future__ import annotations

import copy
from dataclasses import asdict
from importlib import util

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lit_distill.generation import SamplingParams, generate
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM, LoraSpec, ModelSpec, validate_specs
from lit_distill.models.lora import add_lora, fingerprint, restrict_state_dict_to_trainable
from lit_distill.models.merging import merged_weights
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts

KEY = "model.student.lora"


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


def moved(model: nn.Module) -> nn.Module:
    """As after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def adapted(model: nn.Module | None = None, **settings) -> nn.Module:
    model = tiny_llama() if model is None else model
    add_lora(model, LoraSpec(**{"r": 3, **settings}), KEY)
    return moved(model)


CASES = {
    "all linear layers": (tiny_llama, {}),
    "transposed layers": (tiny_gpt2, {}),
    "two layers": (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 7}),
    "a regular expression": (tiny_llama, {"target_modules": r".*layers\.1.*mlp.*_proj", "use_rslora": True}),
    "the head": (tiny_llama, {"target_modules": ["o_proj", "lm_head"]}),
    "the embeddings": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "a head that is trained whole": (tiny_llama, {"modules_to_save": ["lm_head", "model.norm"]}),
    "norms apart from directions": (tiny_llama, {"use_dora": True}),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own model asks
@pytest.mark.parametrize(("build", "settings"), CASES.values(), ids=CASES)
def test_losses_and_gradients_are_those_of_pefts_own_model(build, settings, teacher, text) -> None:
    base = build()
    lora = LoraSpec(**{"r": 3, **settings})
    theirs: PeftModel = get_peft_model(
        copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=build is tiny_gpt2, **asdict(lora))
    )
    moved(theirs)
    add_lora(base, lora, KEY)
    trained = {f"base_model.model.{name}": p for name, p in base.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, parameter in trained.items():
        parameter.data.copy_(expected[name].data)

    student = CausalLM(base)
    objectives = {"kd": ForwardKL(), "ce": NextToken()}
    loss, _ = ObjectiveEvaluator(objectives, student, teacher, "model.objectives", chunk_rows=7)(
        text, {"kd": 1.0, "ce": 0.5}
    )
    loss.backward()

    rows = text.target_mask[:, 1:]
    positions = {"position_ids": (text.attention_mask.cumsum(-1) - 1).clamp(min=0)}
    logits = theirs(input_ids=text.input_ids, attention_mask=text.attention_mask, **positions).logits[:, :-1][rows]
    with torch.no_grad():
        said = teacher.lm.model(input_ids=text.input_ids, attention_mask=text.attention_mask, **positions).logits[
            :, :-1
        ]
    kl = F.kl_div(logits.log_softmax(-1), said[rows].log_softmax(-1), reduction="sum", log_target=True)
    plain = kl + 0.5 * F.cross_entropy(logits, text.input_ids[:, 1:][rows], reduction="sum")
    plain.backward()

    torch.testing.assert_close(loss, plain)
    for name, parameter in expected.items():
        rounding = 1e-5 * max(1.0, float(parameter.grad.abs().max()))  # of sums whose terms are as large as the largest
        torch.testing.assert_close(trained[name].grad, parameter.grad, rtol=1e-4, atol=rounding, msg=name)
    assert all(p.grad is None for p in base.parameters() if not p.requires_grad)


@pytest.mark.parametrize(("build", "settings"), CASES.values(), ids=CASES)
def test_merged_into_a_plain_model_they_compute_the_same(build, settings, ids) -> None:
    model = adapted(build(), **settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = build()
    plain.load_state_dict(merged_weights(model))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids % 41).logits, model(ids % 41).logits, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_module_to_save_is_named_by_its_end_not_by_its_last_letters() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["norm"])
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert whole == {"model.norm.modules_to_save.default.weight"}


def test_before_training_adapters_change_nothing_and_are_float32_over_a_base_of_16_bits(ids) -> None:
    model = tiny_llama().bfloat16()
    plain = copy.deepcopy(model)
    add_lora(model, LoraSpec(r=2), KEY)
    assert torch.equal(model(ids % 41).logits, plain(ids % 41).logits)
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert model.dtype == torch.bfloat16


def test_a_base_of_16_bits_learns_through_float32_adapters(teacher, text) -> None:
    student = CausalLM(adapted(tiny_llama().bfloat16(), target_modules=["q_proj", "lm_head"]))
    loss, _ = ObjectiveEvaluator({"kd": ForwardKL()}, student, teacher, "model.objectives")(text, {"kd": 1.0})
    loss.backward()
    exact = CausalLM(adapted(tiny_llama(), target_modules=["q_proj", "lm_head"]))
    exact.load_state_dict({name: value.float() for name, value in student.state_dict().items()})
    same, _ = ObjectiveEvaluator({"kd": ForwardKL()}, exact, teacher, "model.objectives")(text, {"kd": 1.0})
    same.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, same, rtol=0.02, atol=0.02)
    for (name, mine), theirs in zip(student.named_parameters(), exact.parameters(), strict=True):
        if mine.requires_grad:
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.1, atol=0.05 * scale, msg=name)


class Holder(nn.Module):
    """A module that has the student somewhere, as the LightningModule does, and something else that is saved."""

    def __init__(self, lm: CausalLM) -> None:
        super().__init__()
        self.student = lm
        self.other = nn.Linear(2, 2)


def test_a_state_dict_holds_what_trains_and_loads_strictly() -> None:
    holder = Holder(CausalLM(adapted(modules_to_save=["lm_head"])))
    restrict_state_dict_to_trainable(holder.student)
    state = {name: value.clone() for name, value in holder.state_dict().items()}
    trained = {name for name, p in holder.named_parameters() if p.requires_grad}
    assert state.keys() == trained
    assert any("lora_A" in name for name in trained)

    model = tiny_llama()
    model.load_state_dict(
        {
            name.replace(".base_layer", "").replace("original_module.", ""): value
            for name, value in (
                (n, v)
                for n, v in holder.student.model.state_dict().items()
                if "lora_" not in n and "modules_to_save" not in n
            )
        }
    )
    add_lora(model, LoraSpec(r=3, modules_to_save=["lm_head"]), KEY)
    other = Holder(CausalLM(model))
    restrict_state_dict_to_trainable(other.student)
    other.load_state_dict(state)
    for (name, mine), theirs in zip(other.named_parameters(), holder.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    lost = next(name for name in state if "lora_B" in name)
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B"):
        other.load_state_dict({name: value for name, value in state.items() if name != lost})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "student.model.x": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*other\.weight"):
        other.load_state_dict({name: value for name, value in state.items() if name != "other.weight"})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
    ],
    ids=str,
)
def test_a_shared_teacher_says_what_the_base_says_and_changes_nothing(settings, text) -> None:
    base = tiny_llama(attention_dropout=0.5)
    separate = FrozenTeacher(CausalLM(copy.deepcopy(base)))
    student = CausalLM(adapted(base, lora_dropout=0.0, **settings))
    needs = [p.requires_grad for p in student.parameters()]
    pointers = {p.data_ptr() for p in student.parameters()}
    own_head = student.head().weight.detach().clone()
    shared = FrozenTeacher(student, shared=True)
    student.train()
    with torch.enable_grad():
        rows, head = shared.target_rows(text), shared.head()
    assert not rows.requires_grad
    assert not head.weight.requires_grad
    assert head.weight.data_ptr() in pointers
    expected = separate.head().logits(separate.target_rows(text))
    assert torch.equal(head.logits(rows), expected)
    hidden = shared(text.input_ids, text.attention_mask)
    assert torch.equal(hidden, separate(text.input_ids, text.attention_mask))
    assert student.training
    assert [p.requires_grad for p in student.parameters()] == needs
    assert torch.equal(student.head().weight, own_head)
    student.eval()
    assert not torch.allclose(student.target_rows(text), rows)


def test_student_and_shared_teacher_write_in_turns_with_caches_of_their_own() -> None:
    base = tiny_llama()
    separate = FrozenTeacher(CausalLM(copy.deepcopy(base)))
    student = CausalLM(adapted(base))
    shared = FrozenTeacher(student, shared=True)
    prompts = Prompts(torch.randint(41, (3, 6)), torch.ones(3, 6, dtype=torch.int64))
    greedy = SamplingParams(max_new_tokens=9, temperature=0.0)

    def written(speaker) -> Tensor:
        return generate(speaker, prompts, greedy, [-1], None).ids

    before = written(student)
    assert torch.equal(written(shared), written(separate))
    assert torch.equal(written(student), before)
    assert not torch.equal(written(shared), before)


def test_training_does_not_move_the_shared_teacher_and_leaves_the_base_as_it_was(text) -> None:
    base = tiny_llama()
    student = CausalLM(adapted(base))
    shared = FrozenTeacher(student, shared=True)
    frozen = {name: p.detach().clone() for name, p in student.named_parameters() if not p.requires_grad}
    said = shared.target_rows(text)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    measure = ObjectiveEvaluator({"kd": ForwardKL(), "ce": NextToken()}, student, shared, "model.objectives")
    start = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
    for _ in range(3):
        optimizer.zero_grad()
        measure(text, {"kd": 1.0, "ce": 1.0})[0].backward()
        optimizer.step()
    now = dict(student.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert not any(torch.equal(now[name], value) for name, value in start.items())
    assert torch.equal(shared.target_rows(text), said)


def test_dropout_of_adapters_is_off_while_text_is_written(text) -> None:
    student = CausalLM(adapted(lora_dropout=0.5)).train()
    assert not torch.equal(*(student.target_rows(text) for _ in range(2)))
    with student.generation_mode():
        assert torch.equal(*(student.target_rows(text) for _ in range(2)))
    assert student.training


def test_a_fingerprint_tells_bases_apart_but_not_their_adapters() -> None:
    torch.manual_seed(1)
    base = tiny_llama()
    first, again = adapted(copy.deepcopy(base)), adapted(copy.deepcopy(base).bfloat16(), r=2)
    base.model.layers[1].mlp.up_proj.weight.data.mul_(1.1)
    assert fingerprint(first) == fingerprint(again)
    assert fingerprint(first) != fingerprint(adapted(base))


WRONG_NAMES = {
    "a layer that there is not": (
        {"target_modules": ["q_proj", "qkv"]},
        r"lora\.target_modules: the model has no 'qkv'\. It has down_proj, embed_tokens, gate_proj, .*v_proj\.",
    ),
    "an expression that matches nothing": (
        {"target_modules": "q_proj"},
        "'q_proj' matches no layer. The model has down_proj",
    ),
    "a module that there is not": (
        {"modules_to_save": ["score"]},
        r"lora\.modules_to_save: the model has no 'score'\. It has .*norm",
    ),
    "dropout before the head": (
        {"target_modules": ["lm_head"], "lora_dropout": 0.1},
        r"lora\.target_modules contains the output head.*lora_dropout",
    ),
    "norms of the head": ({"target_modules": ["lm_head"], "use_dora": True}, "use_dora"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_names_that_cannot_be_are_refused_with_those_there_are(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_llama(), LoraSpec(**settings), KEY)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_weights_that_are_one_are_not_separated(settings) -> None:
    with pytest.raises(
        ValueError, match=rf"lora\.{next(iter(settings))} contains the embeddings or the head, which are one"
    ):
        add_lora(tiny_llama(tie_word_embeddings=True), LoraSpec(**settings), KEY)


LORA = {"lora": LoraSpec()}
WRONG_SPECS = {
    "no rank": ({"lora": LoraSpec(r=0)}, None, r"^student\.lora\.r: expected a rank of at least 1, got 0"),
    "no scale": ({"lora": LoraSpec(lora_alpha=0)}, None, r"lora\.lora_alpha: expected a number > 0"),
    "all dropped": (
        {"lora": LoraSpec(lora_dropout=1.0)},
        None,
        r"lora\.lora_dropout: expected a probability in \[0, 1\), got 1",
    ),
    "no targets": ({"lora": LoraSpec(target_modules=[])}, None, r"lora\.target_modules is empty"),
    "no expression": (
        {"lora": LoraSpec(target_modules="(q")},
        None,
        r"lora\.target_modules: '\(q' is not a regular expr",
    ),
    "a random base": ({**LORA, "from_scratch": True}, None, r"^student\.from_scratch: .*student\.lora"),
    "a teacher that learns": ({}, LORA, r"^teacher\.lora: the teacher is not trained"),
    "a student that shares": (
        {"shared_with_student": True},
        None,
        r"^student\.shared_with_student: is an option of the teacher",
    ),
    "nothing to share": (
        {},
        {"shared_with_student": True},
        r"shared_with_student: is true, but all weights of the student are trained",
    ),
    "another base": (LORA, {"shared_with_student": True, "path": "y"}, r"^teacher\.path: .*'x', not 'y'"),
    "another dtype": (
        LORA,
        {"shared_with_student": True, "dtype": "float16"},
        r"^teacher\.dtype: .*None, not 'float16'",
    ),
    "more layers": (
        {**LORA, "keep_layers": 1},
        {"shared_with_student": True},
        r"^teacher\.keep_layers: .* expected 1, not None",
    ),
    "few bits that train": (
        {"quantization": {"quant_method": "quanto"}},
        None,
        r"^student\.quantization: quantised weights cannot be trained",
    ),
}


@pytest.mark.parametrize(("student", "teacher", "message"), WRONG_SPECS.values(), ids=WRONG_SPECS)
def test_specs_that_contradict_each_other_are_refused(student, teacher, message) -> None:
    with pytest.raises(ValueError, match=message):
        validate_specs(ModelSpec(**{"path": "x", **student}), teacher and ModelSpec(**{"path": "x", **teacher}))


def test_a_shared_teacher_need_not_repeat_what_the_student_says() -> None:
    student = ModelSpec("x", dtype="bfloat16", lora=LoraSpec(), gradient_checkpointing=True)
    validate_specs(student, ModelSpec("x", shared_with_student=True))


def test_without_peft_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr("lit_distill.models.lora.find_spec", lambda name: None)
    assert util.find_spec("peft")
    with pytest.raises(ValueError, match=r"^student\.lora: adapters need peft.*pip install 'lit-distill\[lora\]'"):
        validate_specs(ModelSpec("x", lora=LoraSpec()), None)
