"""Continual post-training of multimodal language models, the Lightning way."""

__version__ = "0.1.0"
