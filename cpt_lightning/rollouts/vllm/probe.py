"""A fixed prompt and completion, on which an engine's log-probabilities must be the policy's, and move as these do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpt_lightning.types import Completions, Prompts


@dataclass
class Probe:
    """What engine and policy said of the same tokens when they were asked last.

    Args:
        prompt: One prompt, its images as pixels.
        completion: One completion.
        tolerance: Largest difference between both, in nats a token.
        engine_logps: ``[T]`` by the engine; ``None`` before the first time.
        policy_logps: ``[T]`` by the policy; ``None`` before the first time.
    """

    prompt: Prompts
    completion: Completions
    tolerance: float
    engine_logps: Tensor | None = None
    policy_logps: Tensor | None = None

    def complaint(self, engine_logps: Tensor, policy_logps: Tensor) -> str | None:
        """What speaks against the engine having the policy's weights; both are kept for the next time.

        Args:
            engine_logps: ``[T]`` as the engine scores the completion now.
            policy_logps: ``[T]`` as the policy does.
        """
        before, policy_before = self.engine_logps, self.policy_logps
        self.engine_logps, self.policy_logps = engine_logps, policy_logps
        difference = float((engine_logps - policy_logps).abs().max())
        if not difference <= self.tolerance:  # a NaN is no agreement
            return (
                f"on a probe of {len(engine_logps)} tokens its log-probabilities differ from the policy's by up to "
                f"{difference:.3g} nats, and sampler.tolerance is {self.tolerance:g}"
            )
        if before is None or policy_before is None:
            return None
        moved = float((policy_logps - policy_before).abs().max())
        if moved > 0 and torch.equal(engine_logps, before):
            return f"the update moved the policy's log-probabilities on a probe by {moved:.3g} nats, the engine's not"
        return None
