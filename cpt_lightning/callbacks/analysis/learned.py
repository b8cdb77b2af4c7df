"""What an update learns from: the completions, and what its loss wants of each of their tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpt_lightning.functional import residual_squared
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.rollouts import completion_logprobs
from cpt_lightning.types import Completions, Prompts, Scored

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL


@dataclass
class Part:
    """A micro-batch of an update.

    Args:
        prompts: B prompts.
        completions: N completions of M tokens.
        temperature: That divided the logits.
        residual_squared: ``[M]`` squared norm of each log-probability's gradient with respect to the logits.
        slopes: ``[M]`` derivative of the loss with respect to each log-probability; 0 until backward has passed.
    """

    prompts: Prompts
    completions: Completions
    temperature: float
    residual_squared: Tensor
    slopes: Tensor

    def take(self, slopes: Tensor) -> None:
        """Remembers what backward brings."""
        self.slopes = slopes.detach().clone()

    @property
    def is_learned(self) -> Tensor:
        """``[N]`` whether the loss has a slope at any token of a completion."""
        return self.completions.unpacked(self.slopes).ne(0).any(dim=1)

    def objective(self, model: QwenVL) -> Tensor:
        """The log-probabilities by a model, each times the negative slope of the loss, summed."""
        logps = completion_logprobs(model, self.prompts, self.completions, temperature=self.temperature)
        return -(self.completions.unpacked(self.slopes) * logps).sum()


class Learned:
    """Listens to a module while the losses of one update are computed and go back; of this rank's micro-batches.

    Args:
        model: The one that learns.
    """

    def __init__(self, model: QwenVL) -> None:
        self.model = model
        self.parts: list[Part] = []

    def __call__(self, scored: Scored) -> None:
        """Takes a micro-batch."""
        targets = scored.completions.ids[scored.completions.mask]
        residual = residual_squared(scored.hidden, output_weight(self.model).detach(), targets, scored.temperature)
        # The pass over the prompts that a rollout left is of these weights, and part of a graph.
        prompts = replace(scored.prompts, state=None)
        part = Part(prompts, scored.completions, scored.temperature, residual, torch.zeros_like(residual))
        scored.logps.register_hook(part.take)
        self.parts.append(part)

    @property
    def gradient_squared(self) -> float:
        """``||G||^2``, of the loss's gradient with respect to all logits."""
        return sum(float((part.slopes.square() * part.residual_squared).sum()) for part in self.parts)

    def objective(self, model: QwenVL) -> Tensor:
        """What the update raises.

        At the weights before the update its gradient is that of the loss, less its sign and what depends on no token.
        """
        return torch.stack([part.objective(model) for part in self.parts]).sum()

    def surprise(self, model: QwenVL) -> Mapping[str, tuple[float, int]]:
        """By task the negative log-probability of all that is learned, in nats at temperature 1, and its tokens."""
        found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for part in self.parts:
            rows = part.is_learned.nonzero().flatten().tolist()
            if not rows:
                continue
            logps = completion_logprobs(model, part.prompts, part.completions).double().sum(dim=1)
            lengths, group_size = part.completions.lengths, len(part.completions) // len(part.prompts)
            for row in rows:
                task = part.prompts.examples[row // group_size].task
                nats, tokens = found[task]
                found[task] = nats - float(logps[row]), tokens + int(lengths[row])
        return found
