"""Ablations on the embedded task: the full method and variants without one part, over several seeds.

Run: python tools/ablation.py minillm --seeds 1 2 3 4 5        (about two minutes per run on one core)
     python tools/ablation.py dpkd --seeds 1 2 3 4 5

Finished runs are not repeated. Further arguments are passed to `lit-distill fit`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from lit_distill.cli.app import DistillCLI

CONFIGS = Path(__file__).parent.parent / "configs"
SCORING = "--model.source.init_args.scoring"
VARIANTS: dict[str, dict[str, list[str]]] = {
    "minillm": {
        "full": [],
        "no length norm": [f"{SCORING}.length_normalize", "false"],
        "no teacher mix": ["--model.source.init_args.alpha", "0"],
        "no single-step": ["--model.objectives.single.weight", "0", f"{SCORING}.include_current", "true"],
        "reference preset": [
            *(f"{SCORING}.gamma", "0.95", f"{SCORING}.include_current", "true", f"{SCORING}.standardize", "padded"),
            *(f"{SCORING}.reward_scale", "0.5", f"{SCORING}.reward_clip", "100"),
            *("--model.objectives.single.importance_weighted", "false"),
        ],
        "exact weights": [f"{SCORING}.importance_weight", "exact"],
    },
    "dpkd": {
        "full": [],
        "no corpus": ["--model.corpus_objectives.lm.weight", "0"],
        "no ce": ["--model.objectives.ce.weight", "0"],
        "preference alone": ["--model.objectives.ce.weight", "0", "--model.corpus_objectives.lm.weight", "0"],
        "ce and corpus alone": ["--model.objectives.dpkd.weight", "0"],
        "no length norm": ["--model.objectives.dpkd.length_normalize", "false"],
        "teacher chosen": ["--model.source.init_args.chosen", "teacher"],
    },
}
TEST_METRICS = ("rouge_l", "exact_match", "reverse_kl", "perplexity", "response_length", "distinct_4")
TRAINING_METRICS = ("train/dpkd/rejected_logprob", "train/dpkd/chosen_logprob", "train/dpkd/accuracy")


def run(method: str, variant: str, seed: int, folder: Path, extra: list[str]) -> dict[str, float]:
    """Train once; returns the student's test metrics and the last training metrics."""
    arguments = ["fit", "--config", str(CONFIGS / f"{method}_quickstart.yaml"), "--seed_everything", str(seed)]
    arguments += ["--trainer.default_root_dir", str(folder)]
    arguments += ["--run_name", f"{variant.replace(' ', '_')}-{seed}", "--trainer.enable_progress_bar", "false"]
    arguments += [
        "--trainer.callbacks",
        "[]",
        "--generation.max_prompts",
        "-1",
        "--generation.every_n_validations",
        "1000000",
    ]
    sys.argv = sys.argv[:1]  # Lightning warns if sys.argv has arguments and `args` is passed too
    cli = DistillCLI([*arguments, *VARIANTS[method][variant], *extra])
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name in TRAINING_METRICS}
    (after,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return metrics | {name.removeprefix("test/"): value for name, value in after.items()}


def main() -> None:
    """Do the missing runs, and print mean ± standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--variants", nargs="+", help="variants of the method; all by default")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    arguments, extra = parser.parse_known_args()
    known = VARIANTS[arguments.method]
    chosen = arguments.variants or list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"--variants: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    folder = arguments.folder / arguments.method
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in chosen}
    for seed in arguments.seeds:
        for variant in chosen:
            done = folder / f"{variant.replace(' ', '_')}-{seed}.json"
            if not done.exists():
                done.write_text(json.dumps(run(arguments.method, variant, seed, folder, extra)))
            results[variant].append(json.loads(done.read_text()))
    shown = [
        name
        for name in (*TEST_METRICS, *TRAINING_METRICS)
        if any(name in row for rows in results.values() for row in rows)
    ]
    heads = [name.rsplit("/", 1)[-1] for name in shown]
    print(f"{'':20}" + "".join(f"{head:>20}" for head in heads))
    for variant, rows in results.items():
        cells = []
        for name in shown:
            values = [row[name] for row in rows if name in row]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}" if values else "-")
        print(f"{variant:20}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
