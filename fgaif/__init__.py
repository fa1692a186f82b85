"""FGAIF: fine-grained AI feedback for vision-language models (arXiv 2404.05046)."""

__version__ = "0.1.0"
