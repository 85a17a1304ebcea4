"""White-box distillation of language models on PyTorch Lightning. A method is a YAML file: whose text, what is measured, how often."""

__version__ = "0.1.0"
