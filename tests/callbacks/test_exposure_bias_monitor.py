"""The monitor's figures equal a slow computation on the same texts, and it speaks up where it cannot measure."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import run, tiny_config, write
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_distill.callbacks import ExposureBiasMonitor
from lit_distill.callbacks.exposure_bias import draw_errors
from lit_distill.generation import SamplingParams

LENGTH, SAMPLES = 6, 2


def options(**more):
    given = {"max_prompts": -1, "num_samples": SAMPLES, "max_new_tokens": LENGTH, "lengths": [1, 3, 6], **more}
    return [part for name, value in given.items() for part in (f"--exposure_bias.{name}", value)]


def monitor(cli) -> ExposureBiasMonitor:
    return next(c for c in cli.trainer.callbacks if isinstance(c, ExposureBiasMonitor))


@pytest.fixture(scope="module")
def tested(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("test")
    config = tiny_config(pair) | {"generation": {"max_prompts": 0}}
    config["model"]["micro_batch_size"] = 3
    config["trainer"]["default_root_dir"] = str(folder)
    return run("test", "--config", write(config, folder / "x.yaml"), *options())


def slow_errors(cli, batch, writer: str) -> torch.Tensor:
    """[LENGTH]: mean KL at every token, one forward of transformers for each."""
    learner = cli.model
    models = learner.teacher.lm.model, learner.student.model.eval()
    sums = torch.zeros(LENGTH, dtype=torch.float64)
    for sample in range(SAMPLES):
        keys = tuple(f"{item}/{sample}" if sample else item for item in batch.ids)
        responses = learner.generate(batch.prompts, keys, SamplingParams(LENGTH, 1.0), 0, writer)
        for prompt, ids, mask in zip(batch.prompt_texts, responses.ids, responses.mask, strict=True):
            prefix = learner.tokenizer(prompt).input_ids
            for t, token in enumerate(ids[mask].tolist()):
                with torch.no_grad():
                    log_p, log_q = (m(torch.tensor([prefix])).logits[0, -1].double().log_softmax(-1) for m in models)
                sums[t] += (log_p.exp() * (log_p - log_q)).sum()
                prefix = [*prefix, token]
    return sums / (SAMPLES * len(batch))


def test_the_report_equals_a_slow_computation_on_the_same_texts(tested) -> None:
    (batch,) = tested.trainer.datamodule.test_dataloader()
    found = monitor(tested).report()["exposure_bias"]
    regret, baseline = (slow_errors(tested, batch, writer).cumsum(0) for writer in ("student", "teacher"))
    assert found["lengths"] == [1, 2, 3, 4, 5, 6]
    assert found["regret_student"] == pytest.approx(regret.tolist(), rel=1e-4)
    assert found["regret_teacher"] == pytest.approx(baseline.tolist(), rel=1e-4)
    assert found["ex_acc_err"] == pytest.approx((100 * (regret - baseline) / baseline).tolist(), abs=0.02)
    assert (found["num_prompts"], found["num_samples"]) == (len(batch), SAMPLES)
    json.dumps(found, allow_nan=False)


def test_the_chosen_lengths_are_scalars_and_the_curve_is_a_figure(tested) -> None:
    found = monitor(tested).report()["exposure_bias"]["ex_acc_err"]
    for length in (1, 3, 6):
        value = tested.trainer.callback_metrics[f"test/ex_acc_err_{length}"].item()
        assert value == pytest.approx(found[length - 1], abs=1e-3)
    events = EventAccumulator(tested.trainer.log_dir)
    events.Reload()
    assert "test/exposure_bias" in events.Tags()["images"]


def test_the_figure_has_the_excess_above_and_what_it_is_made_of_below() -> None:
    figure = Figure()
    draw_errors(figure, regret=[0.5, 0.9], baseline=[0.0, 0.6], excess=[float("inf"), 50.0])
    drawn = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert drawn == [[[float("inf"), 50.0]], [[0.5, 0.9], [0.0, 0.6]]]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 2]
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert labels == ["student's texts: R(l)", "teacher's texts: l·ε(l)"]


def test_a_teacher_that_is_its_own_student_has_no_excess(pair, tmp_path) -> None:
    config = write(tiny_config(pair), tmp_path / "x.yaml")
    cli = run("test", "--config", config, *options(), "--model.student.path", pair[1], "--trainer.logger", "false")
    assert monitor(cli).report()["exposure_bias"]["ex_acc_err"] == [0.0] * LENGTH


def test_a_length_that_no_text_reaches_has_no_scalar_and_is_named(pair, tmp_path, monkeypatch) -> None:
    def one_token(self, prompts, ids, sampling, seed=0, model="student"):
        return original(self, prompts, ids, SamplingParams(2, 1.0), seed, model)

    from lit_distill.module import DistillationModule

    original = DistillationModule.generate
    monkeypatch.setattr(DistillationModule, "generate", one_token)
    said = []
    monkeypatch.setattr("lit_distill.callbacks.exposure_bias.rank_zero_info", said.append)
    config = write(tiny_config(pair) | {"generation": {"max_prompts": 0}}, tmp_path / "x.yaml")
    figures = run("test", "--config", config, *options(), "--trainer.logger", "false").trainer.callback_metrics
    assert [name for name in figures if "ex_acc_err" in name] == ["test/ex_acc_err_1"]
    assert said == [
        "ExposureBiasMonitor.lengths: the longest text has 2 tokens, so nothing is logged at 3, 6.",
    ]


def test_it_is_off_by_default_and_at_validations_unless_asked_for(pair, tmp_path) -> None:
    config = write(tiny_config(pair) | {"generation": {"max_prompts": 0}}, tmp_path / "x.yaml")
    for command, more, expected in (
        ("test", [], 0),
        ("validate", options(), 0),
        ("validate", options(every_n_validations=1), 3),
    ):
        cli = run(command, "--config", config, *more, "--trainer.logger", "false")
        assert sum("ex_acc_err" in name for name in cli.trainer.callback_metrics) == expected
        assert monitor(cli).report() == {}


def test_without_a_teacher_it_says_which_key_to_set(pair, tmp_path) -> None:
    config = tiny_config(pair, objectives={"ce": "NextToken"})
    del config["model"]["teacher"]
    with pytest.raises(ValueError, match=r"^exposure_bias\.max_prompts: -1, but .* no teacher .* model\.teacher\.path"):
        run("test", "--config", write(config, tmp_path / "x.yaml"), *options(), "--trainer.logger", "false")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_prompts": -2}, r"^max_prompts: .* -2"),
        ({"num_samples": 0}, r"^num_samples: .* 0"),
        ({"max_new_tokens": 8, "lengths": [4, 9]}, r"^lengths: .* \(8\), got \[4, 9\]"),
        ({"lengths": [0]}, r"^lengths: .*\[0\]"),
        ({"every_n_validations": 0}, r"^every_n_validations: .* 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_with_their_key(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        ExposureBiasMonitor(**given)
