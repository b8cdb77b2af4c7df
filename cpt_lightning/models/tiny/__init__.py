"""The embedded base: a Qwen2.5-VL of 3 M parameters in ``base/``, and what builds it from nothing."""
