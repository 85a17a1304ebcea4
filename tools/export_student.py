"""Export the student of any checkpoint as a Hugging Face folder, without the run's YAML.

python tools/export_student.py runs/kd/version_0/checkpoints/last.ckpt student --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_distill.callbacks.export import export_checkpoint


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a .ckpt that `lit-distill fit` has written: file or folder")
    parser.add_argument("folder", type=Path, help="where to write config, weights, tokenizer and generation config")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the exported weights; default: as stored"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="for a student with adapters: export the adapters alone instead of merging them",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not load the exported folder to compare it with the checkpoint's student",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    given = parser.parse_args(arguments)
    if not given.checkpoint.exists():
        sys.exit(f"error: checkpoint {given.checkpoint} does not exist.")
    if given.folder.exists() and not given.overwrite and (not given.folder.is_dir() or any(given.folder.iterdir())):
        sys.exit(f"error: {given.folder} already exists. Give another folder, or set --overwrite.")
    given.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        settings = {"dtype": given.dtype, "merge_lora": not given.adapter, "verify": not given.no_verify}
        folder = export_checkpoint(given.checkpoint, given.folder, **settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"Exported the student to {folder}")


if __name__ == "__main__":
    main()
