"""vLLM as the engine that samples, in a process of its own beside each rank."""

from cpt_lightning.rollouts.vllm.sampler import VLLM

__all__ = ["VLLM"]
