"""MiniLLM's ablation on the embedded task: the whole method, and without one part at a time, over several seeds.

Run: python tools/minillm_ablation.py --seeds 1 2 3 4 5        (about two minutes a run on one core; six variants)
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from lit_distill.callbacks import BeforeAfter

from lit_distill.cli import DistillCLI

CONFIG = Path(__file__).parent.parent / "configs" / "minillm_quickstart.yaml"
SCORING = "--model.source.init_args.scoring"
VARIANTS = {
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
}
FIGURES = ("rouge_l", "exact_match", "reverse_kl", "perplexity", "response_length", "distinct_4")


def run(variant: str, seed: int, folder: Path, extra: list[str]) -> dict[str, float]:
    """The student's figures after one run."""
    arguments = ["fit", "--config", str(CONFIG), "--seed_everything", str(seed)]
    arguments += ["--trainer.default_root_dir", str(folder)]
    arguments += ["--run_name", f"{variant.replace(' ', '_')}-{seed}", "--trainer.enable_progress_bar", "false"]
    cli = DistillCLI([*arguments, *VARIANTS[variant], *extra])
    report = next(callback for callback in cli.trainer.callbacks if isinstance(callback, BeforeAfter))
    return report.figures["student after"] | {f"before/{k}": v for k, v in report.figures["student before"].items()}


def main() -> None:
    """Run what has not been run yet, and print mean ± standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    arguments, extra = parser.parse_known_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in arguments.variants}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            done = arguments.folder / f"{variant.replace(' ', '_')}-{seed}.json"
            if not done.exists():
                done.write_text(json.dumps(run(variant, seed, arguments.folder, extra)))
            results[variant].append(json.loads(done.read_text()))
    print(f"{'':18}" + "".join(f"{name:>20}" for name in FIGURES))
    for variant, rows in results.items():
        cells = []
        for name in FIGURES:
            values = [row[name] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"{variant:18}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
