"""White-box distillation of language models on PyTorch Lightning. A method is a YAML file."""

import os

# On a processor, idle threads that spin while they wait slow each other down tenfold as soon as something else runs there.
# OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
