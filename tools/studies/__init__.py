"""Studies: their YAML files, and what `tools/study.py` is made of."""
