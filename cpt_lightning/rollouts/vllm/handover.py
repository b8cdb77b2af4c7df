"""All weights on their way to an engine, and what speaks against their having come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpt_lightning.rollouts.vllm.process import EngineProcess
from cpt_lightning.rollouts.vllm.weights import buckets, checksum, differing, language_weights, looked_at

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL


def hand_over(engine: EngineProcess, model: QwenVL, buffer: Tensor, dtype: torch.dtype, num_shares: int) -> str | None:
    """Sends all weights, and reads some of each back.

    Args:
        engine: Gets them.
        model: Has them.
        buffer: ``[bytes]`` that both have opened.
        dtype: What the engine computes in.
        num_shares: How many of its workers share each layer.

    Returns:
        What is wrong with what came; ``None`` if nothing is.
    """
    sent: dict[str, Tensor] = {}

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, weight in language_weights(model, dtype):
            sent[name] = looked_at(name, weight, num_shares)
            yield name, weight

    for places in buckets(noted(), buffer):
        expected = checksum(buffer[: places[-1].end])
        if any(came != expected for came in engine.call("receive", places)):
            return f"what came of {places[0].name} to {places[-1].name} is not what was sent"
    engine.call("load")
    if wrong := differing(sent, engine.call("read_back")):
        return f"{len(wrong)} of {len(sent)} weights are not those that were sent, such as {wrong[0]}"
    return None
