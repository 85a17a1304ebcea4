"""transformers' continuous batching gives the responses of the project's own decoder, and leaves the model as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from command_line import main, run, tiny_config, write
from tiny import tiny_llama
from training import learner_of, quiet_trainer

from lit_distill.data import ProceduralData
from lit_distill.generation import ContinuousBatching, Decoder, SamplingParams
from lit_distill.generation.continuous import PagedGenerator
from lit_distill.models import CausalLM, ModelSpec
from lit_distill.models.precision import weights_in
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.sources import StudentRollouts, TeacherMixedRollouts
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts

pytest.importorskip("transformers", "5.24")
STOPS = (3, 4)
COMMON = 37
"""Tokens that student and teacher share; the head has 41 rows."""


@pytest.fixture
def lm() -> CausalLM:
    """A model whose greedy responses vary, and whose last tokens, which it must not generate, are the most probable."""
    model = tiny_llama(hidden=32, initializer_range=0.4, num_key_value_heads=1)
    with torch.no_grad():
        model.lm_head.weight[COMMON:] *= 5
    return CausalLM(model, COMMON)


def left_padded(rows: list[list[int]]) -> Prompts:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return Prompts(ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]))


@pytest.fixture
def prompts() -> Prompts:
    return left_padded([torch.randint(5, COMMON, (length,)).tolist() for length in (5, 2, 7, 1) * 3])


def keys(prompts: Prompts) -> list[str]:
    return [f"item-{row}" for row in range(len(prompts))]


SMALL_CACHE = {"page_size": 4, "cache_tokens": 60, "batch_tokens": 16}
"""Long prompts are processed in parts, and responses are evicted before they are complete."""


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        pytest.param({}, SamplingParams(20, temperature=0.0), id="greedy"),
        pytest.param(SMALL_CACHE, SamplingParams(20, 1.0, 12, 0.9), id="truncated, small cache"),
        pytest.param({}, SamplingParams(20, temperature=1.3), id="sampled", marks=pytest.mark.slow),
        pytest.param(SMALL_CACHE, SamplingParams(20, 0.0), id="greedy, small cache", marks=pytest.mark.slow),
    ],
)
def test_its_responses_equal_those_of_the_own_decoder(lm, prompts, settings, sampling) -> None:
    own = Decoder(lm, STOPS).generate(prompts, keys(prompts), sampling, 1)
    theirs = ContinuousBatching(**settings).generator(lm, STOPS).generate(prompts, keys(prompts), sampling, 1)
    assert torch.equal(theirs.ids, own.ids)
    assert torch.equal(theirs.mask, own.mask)
    lengths = own.mask.sum(dim=-1)
    assert lengths.min() < 10 < lengths.max()
    assert theirs.ids.max() < COMMON


def test_recorded_log_probabilities_are_those_of_the_whole_text_in_double_precision(lm, prompts) -> None:
    responses = (
        ContinuousBatching().generator(lm, STOPS).generate(prompts, keys(prompts), SamplingParams(20, 1.3, 9), 2)
    )
    exact = copy.deepcopy(lm.model).double()
    for row in range(len(prompts)):
        prompt = prompts.input_ids[row][prompts.attention_mask[row].bool()]
        said = responses.ids[row][responses.mask[row]]
        with torch.no_grad():
            logits = exact(input_ids=torch.cat([prompt, said])[None]).logits[0, len(prompt) - 1 : -1, :COMMON] / 1.3
        expected = logits.log_softmax(dim=-1).gather(-1, said[:, None])[:, 0]
        found = responses.logprobs[row][responses.mask[row]].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not responses.logprobs[row][~responses.mask[row]].any()


def test_sampled_tokens_follow_the_softmax(lm) -> None:
    draws = 2000
    prompts = left_padded([[7, 9]] * draws)
    responses = (
        ContinuousBatching(batch_tokens=256)
        .generator(lm, ())
        .generate(prompts, keys(prompts), SamplingParams(1, 1.5), 5)
    )
    with torch.no_grad():
        probs = (lm.model(input_ids=torch.tensor([[7, 9]])).logits[0, -1, :COMMON] / 1.5).softmax(dim=-1)
    observed, expected = torch.bincount(responses.ids[:, 0], minlength=COMMON), probs * draws
    often = expected >= 5
    cells = torch.cat([observed[often], observed[~often].sum()[None]])
    means = torch.cat([expected[often], expected[~often].sum()[None]])
    chi_square = ((cells - means) ** 2 / means).sum()
    degrees = torch.tensor(len(cells) - 1.0)
    assert len(cells) > 5
    assert 1 - torch.special.gammainc(degrees / 2, chi_square / 2) > 1e-3


def test_a_response_depends_on_seed_and_key_and_torchs_random_state_is_left_alone(lm, prompts) -> None:
    generator, sampling = ContinuousBatching().generator(lm, STOPS), SamplingParams(12)
    state = torch.get_rng_state()
    first = generator.generate(prompts, keys(prompts), sampling, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = generator.generate(prompts, keys(prompts), sampling, 1)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.logprobs, again.logprobs)
    order = list(range(len(prompts)))[::-1]
    turned = generator.generate(prompts.select(order), keys(prompts)[::-1], sampling, 1)
    assert torch.equal(turned.ids.flip(0), first.ids)
    assert not torch.equal(generator.generate(prompts, keys(prompts), sampling, 2).ids, first.ids)


def test_the_weights_after_an_optimiser_step_are_used(lm, prompts) -> None:
    generator, greedy = ContinuousBatching().generator(lm, STOPS), SamplingParams(12, temperature=0.0)
    before = generator.generate(prompts, keys(prompts), greedy, 0)
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    lm.model(input_ids=prompts.input_ids).logits.square().mean().backward()
    optimizer.step()
    after = generator.generate(prompts, keys(prompts), greedy, 0)
    assert not torch.equal(before.ids, after.ids)
    assert torch.equal(after.ids, Decoder(lm, STOPS).generate(prompts, keys(prompts), greedy, 0).ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_training_mode_and_parameters_are_as_before_even_after_an_error(
    lm, prompts, monkeypatch, attention
) -> None:
    lm.model.set_attn_implementation(attention)
    lm.train()
    parameters = list(lm.parameters())

    def check() -> None:
        assert lm.config._attn_implementation == attention
        assert lm.training
        assert lm.model.model.layers[0].training
        assert all(now is before for now, before in zip(lm.parameters(), parameters, strict=True))
        assert all(parameter.requires_grad for parameter in parameters)

    generator = ContinuousBatching().generator(lm, STOPS)
    generator.generate(prompts, keys(prompts), SamplingParams(2), 0)
    check()
    monkeypatch.setattr(lm.model.model.layers[1], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(RuntimeError, match="division by zero"), torch.autocast("cpu", dtype=torch.bfloat16):
        generator.generate(prompts, keys(prompts), SamplingParams(2), 0)
    check()


def test_copies_of_the_weights_keep_ties_and_are_gone_afterwards() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    own = dict(model.named_parameters(remove_duplicate=False))
    with weights_in(model, torch.bfloat16):
        assert model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(value is own[name] for name, value in model.named_parameters(remove_duplicate=False))
    with weights_in(model, None):
        assert model.dtype == torch.float32


@pytest.mark.slow
def test_under_mixed_precision_log_probabilities_are_those_of_training(lm, prompts, monkeypatch) -> None:
    monkeypatch.setattr("lit_distill.models.causal_lm.product_dtype", lambda dtype, _: dtype)  # also where it is slow
    seen = []
    lm.model.register_forward_pre_hook(lambda model, _: seen.append(model.dtype))
    sampling = SamplingParams(8, temperature=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = Decoder(lm, ()).generate(prompts, keys(prompts), sampling, 0)
        theirs = ContinuousBatching().generator(lm, ()).generate(prompts, keys(prompts), sampling, 0)
    assert set(seen) == {torch.bfloat16}
    same = (own.ids == theirs.ids).cumprod(dim=-1).bool()
    assert same.float().mean() > 0.5
    torch.testing.assert_close(theirs.logprobs[same], own.logprobs[same], rtol=0, atol=0.3)


@pytest.mark.slow
def test_a_teacher_generates_in_its_own_precision(prompts) -> None:
    teacher = FrozenTeacher(CausalLM(tiny_llama(hidden=24, initializer_range=0.4)))
    sampling = SamplingParams(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = Decoder(teacher, STOPS).generate(prompts, keys(prompts), sampling, 0)
        theirs = ContinuousBatching().generator(teacher, STOPS).generate(prompts, keys(prompts), sampling, 0)
    assert torch.equal(theirs.ids, own.ids)
    torch.testing.assert_close(theirs.logprobs, own.logprobs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_teacher_that_shares_the_weights_generates_without_the_adapters(prompts) -> None:
    pytest.importorskip("peft")
    from lit_distill.models.lora import LoraSpec, add_lora

    model = tiny_llama(initializer_range=0.4)
    base = CausalLM(copy.deepcopy(model))
    add_lora(model, LoraSpec(r=2, target_modules=["q_proj", "v_proj"]), "student.lora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    student = CausalLM(model)
    shared, greedy = FrozenTeacher(student, shared=True), SamplingParams(8, temperature=0.0)
    engine = ContinuousBatching()
    expected = Decoder(base, STOPS).generate(prompts, keys(prompts), greedy, 0)
    assert torch.equal(engine.generator(shared, STOPS).generate(prompts, keys(prompts), greedy, 0).ids, expected.ids)
    own = Decoder(student, STOPS).generate(prompts, keys(prompts), greedy, 0)
    assert torch.equal(engine.generator(student, STOPS).generate(prompts, keys(prompts), greedy, 0).ids, own.ids)
    assert not torch.equal(own.ids, expected.ids)


@pytest.mark.slow
def test_every_family_gives_the_own_decoders_responses_or_is_refused(make_model, family, prompts) -> None:
    lm = CausalLM(make_model(family))
    generator, sampling = ContinuousBatching(page_size=8).generator(lm, STOPS), SamplingParams(12)
    refused = {
        "opt": r"ContinuousBatching cannot run OPTForCausalLM .* Remove model\.generator",
        "gemma2": r"leaves out the attn_logit_softcapping of Gemma2ForCausalLM \(eager attention\)",
    }
    if family in refused:
        with pytest.raises(ValueError, match=refused[family]):
            generator.generate(prompts, keys(prompts), sampling, 0)
        return
    own = Decoder(lm, STOPS).generate(prompts, keys(prompts), sampling, 0)
    assert torch.equal(generator.generate(prompts, keys(prompts), sampling, 0).ids, own.ids)


def test_a_model_that_computes_something_else_in_the_engine_is_refused(lm, prompts) -> None:
    lm.model.register_forward_hook(
        lambda _, __, output: setattr(output, "logits", output.logits * 1.5)
    )  # not in the own forward
    with pytest.raises(ValueError, match="ContinuousBatching computes other log-probabilities than LlamaForCausalLM"):
        ContinuousBatching().generator(lm, STOPS).generate(prompts, keys(prompts), SamplingParams(2), 0)


def test_a_cache_that_does_not_fit_names_the_setting(lm, prompts, monkeypatch) -> None:
    generator = ContinuousBatching(page_size=2**20).generator(lm, STOPS)
    generator.gap = 0.0
    monkeypatch.setattr(
        "transformers.generation.continuous_batching.cache.get_device_and_memory_breakdown", lambda: (None, 100, 0, 0)
    )
    with pytest.raises(ValueError, match=r"cache_tokens: 12 prompts with responses of up to 5 tokens do not fit"):
        generator.generate(prompts, keys(prompts), SamplingParams(5), 0)


@pytest.mark.slow
def test_progress_is_the_share_of_responses_that_are_finished(lm, prompts) -> None:
    calls = []
    generator = ContinuousBatching().generator(lm, STOPS, lambda *numbers: calls.append(numbers))
    generator.generate(prompts, keys(prompts), SamplingParams(24), 0)
    assert calls[0] == (0, 24, 12)
    assert calls[-1] == (24, 24, 0)
    assert calls == sorted(calls, key=lambda call: call[0])


def test_a_source_that_mixes_the_teacher_in_keeps_the_own_decoder(pair, tmp_path) -> None:
    mixed = TeacherMixedRollouts(max_new_tokens=4, mini_batch_size=6, inner_epochs=1)
    used = []
    for generator in (None, ContinuousBatching()):
        learner = learner_of(pair, {"kd": ForwardKL()}, mixed, generator=generator)
        quiet_trainer(tmp_path, 1).fit(learner, ProceduralData(num_train=6, num_validation=4, num_test=4, batch_size=6))
        used.append(torch.cat([parameter.flatten() for parameter in learner.student.parameters()]))
    assert isinstance(learner.generators["student"], PagedGenerator)
    assert torch.equal(*used)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"compile": True}, r"cannot run a compiled model, but model\.student\.compile is true"),
        ({"attn_implementation": "flex_attention"}, r"model\.student\.attn_implementation: flex_attention"),
    ],
)
def test_a_setting_that_it_cannot_honour_is_refused_before_weights_load(pair, student, message) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuousBatching().check(ModelSpec(str(pair[0]), **student), None, sharded=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"layer_types": ["linear_attention", "full_attention"]},
            r"no cache for the layers of model\.teacher\.path: .*\(linear_attention\)",
        ),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping of model\.teacher\.path: .* flash_attention_2"),
    ],
)
def test_an_architecture_that_it_cannot_run_is_refused_before_weights_load(pair, tmp_path, config, message) -> None:
    stored = json.loads((pair[1] / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
        ContinuousBatching().check(ModelSpec(str(pair[0])), ModelSpec(str(tmp_path)), sharded=False)


def test_sharded_models_old_versions_and_wrong_sizes_are_refused(pair, monkeypatch) -> None:
    spec = ModelSpec(str(pair[0]))
    with pytest.raises(ValueError, match=r"trainer\.strategy shards them\. Set trainer\.strategy: ddp"):
        ContinuousBatching().check(spec, None, sharded=True)
    monkeypatch.setattr("transformers.__version__", "5.17.1")
    with pytest.raises(ValueError, match=r"needs transformers 5\.24 or newer, got 5\.17\.1"):
        ContinuousBatching().check(spec, None, sharded=False)
    with pytest.raises(ValueError, match="page_size: expected at least 4, got 2"):
        ContinuousBatching(page_size=2)
    with pytest.raises(ValueError, match="cache_tokens: expected at least 1, got 0"):
        ContinuousBatching(cache_tokens=0)


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (
            {"class_path": "ContinuousBatching", "init_args": {"page_size": 2}},
            r"model\.generator\.init_args\.page_size: expected at least 4, got 2\.",
        ),
        ("ContinuousBatching", r"model\.generator: ContinuousBatching cannot run a compiled model"),
    ],
)
def test_the_command_line_names_the_key(pair, tmp_path, monkeypatch, generator, message) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(pair, generator=generator)
    config["model"]["student"]["compile"] = True
    with pytest.raises(SystemExit, match=message):
        main("fit", "--config", write(config, tmp_path / "c.yaml"))


@pytest.mark.slow
def test_fit_and_predict_from_yaml_equal_those_of_the_own_decoder(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses, records = [], []
    for name in ("own", "engine"):
        source = {"class_path": "StudentRollouts", "init_args": {"max_new_tokens": 6}}
        config = tiny_config(pair, source=source)
        if name == "engine":
            config["model"]["generator"] = {"class_path": "ContinuousBatching", "init_args": {"page_size": 64}}
        config["trainer"] |= {"max_steps": 2}
        path = write(config, tmp_path / f"{name}.yaml")
        losses.append(run("fit", "--config", path, "--export.enabled", "false").trainer.callback_metrics["train/loss"])
        answers = ("--model.prediction.model", "teacher", "--model.prediction.logprobs", "true")
        file = tmp_path / f"{name}.jsonl"
        run(
            "predict",
            "--config",
            path,
            "--model.prediction.max_new_tokens",
            5,
            *answers,
            "--model.prediction.path",
            file,
        )
        records.append([json.loads(line) for line in file.read_text().splitlines()])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert len(records[0]) == 48
    assert [record["tokens"] for record in records[0]] == [record["tokens"] for record in records[1]]


def test_student_rollouts_learn_from_its_responses(pair, tmp_path) -> None:
    trained = []
    for generator in (None, ContinuousBatching()):
        source = StudentRollouts(max_new_tokens=6, seed=1)
        learner = learner_of(pair, {"ce": NextToken()}, source, generator=generator)
        quiet_trainer(tmp_path, 2).fit(
            learner, ProceduralData(num_train=12, num_validation=4, num_test=4, batch_size=6)
        )
        trained.append(torch.cat([parameter.detach().flatten() for parameter in learner.student.parameters()]))
    torch.testing.assert_close(*trained, rtol=0, atol=1e-5)
