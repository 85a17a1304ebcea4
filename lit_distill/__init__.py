"""White-box distillation of language models on PyTorch Lightning. A method is a YAML file."""

__version__ = "0.1.0"
