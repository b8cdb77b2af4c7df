"""The influence of an update by gradients: its direction, its first order, and whether it is symmetric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cpt_lightning.callbacks.analysis.learned import Learned
from cpt_lightning.callbacks.analysis.measuring import Asked
from cpt_lightning.models.weights import Weights, trained
from cpt_lightning.rollouts import completion_logprobs
from cpt_lightning.rollouts.sampling import sampling_mode


class ExactInfluence:
    """Looks from the weights before an update, for each x_v, at the gradient of log pi(x_v) over all trained weights.

    The gradient of the update is that of its loss in eval mode, without penalties that callbacks add. On several ranks
    each has the gradients of its x_v and of its part of the update, and all take the same steps.

    Args:
        trainer: Whose ranks share the work.
        module: After the update.
        learned: What the update learned from.
        start: The trained weights before it.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, learned: Learned, start: Weights) -> None:
        self.trainer, self.model, self.learned = trainer, module.model, learned
        self.parameters = list(trained(module).values())
        self.start = [start[name] for name in trained(module)]
        self.moved = _flat([parameter.detach() for parameter in self.parameters]) - _flat(self.start)

    def measure(self, asked: dict[str, Asked]) -> dict[str, dict[str, float]]:
        """``cosine``, ``first_order_change`` and ``asymmetry`` of each name's x_v; the weights are what they were."""
        end = [parameter.detach().clone() for parameter in self.parameters]
        with self._at(self.start, back=end):
            uphill = self._gradient(lambda: self.learned.objective(self.model)) / self.trainer.world_size
            objective = self._objective()
            return {name: self._of_name(each, uphill, objective) for name, each in asked.items()}

    def _of_name(self, asked: Asked, uphill: Tensor, objective: float) -> dict[str, float]:
        before = self._log_probs(asked)
        with self._stepped(uphill) as per_unit:
            of_v_given_u = (self._log_probs(asked) - before) * per_unit
        cosines, first_orders, of_u_given_v = [], [], []
        for number in range(asked.num_rows):
            gradient = self._gradient(partial(self._log_prob, asked, number))
            cosines.append(float(cosine_similarity(gradient, uphill, dim=0)))
            first_orders.append(float(gradient @ self.moved))
            with self._stepped(gradient) as per_unit:
                of_u_given_v.append((self._objective() - objective) * per_unit)
        return {
            "cosine": sum(cosines) / asked.num_rows,
            "first_order_change": sum(first_orders) / asked.num_rows,
            "asymmetry": asymmetry(of_v_given_u, torch.tensor(of_u_given_v, dtype=torch.float64)),
        }

    # -- both directions ---------------------------------------------------------------------------------------------

    def _objective(self) -> float:
        with sampling_mode(self.model):
            return float(self._sum_over_ranks(self.learned.objective(self.model).double())) / self.trainer.world_size

    def _log_probs(self, asked: Asked) -> Tensor:
        """``[num_rows]`` of whole answers."""
        found = torch.zeros(asked.num_rows, dtype=torch.float64, device=self.model.device)
        if asked.prompts is not None and asked.answers is not None:
            prompts, answers = (self.trainer.strategy.batch_to_device(x) for x in (asked.prompts, asked.answers))
            with sampling_mode(self.model):
                found[asked.mine] = completion_logprobs(self.model, prompts, answers).double().sum(dim=1)
        return self._sum_over_ranks(found).cpu()

    def _log_prob(self, asked: Asked, number: int) -> Tensor:
        """Of one answer; 0 without a gradient on ranks that do not have it."""
        if number not in asked.mine or asked.prompts is None or asked.answers is None:
            return torch.zeros((), device=self.model.device)
        rows = [asked.mine.index(number)]
        both = asked.prompts.select(rows), asked.answers.select(rows)
        prompts, answers = (self.trainer.strategy.batch_to_device(each) for each in both)
        return completion_logprobs(self.model, prompts, answers).sum()

    def _gradient(self, value_of: Callable[[], Tensor]) -> Tensor:
        """Of all trained weights in a row, summed over ranks."""
        # Not backward(): it would touch the gradients of the next update, and what ddp has hung on them.
        with sampling_mode(self.model), torch.enable_grad():
            value = value_of()
            wanted = self.parameters if value.requires_grad else []
            found = torch.autograd.grad(value, wanted, allow_unused=True) if wanted else [None] * len(self.parameters)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        return self._sum_over_ranks(_flat(whole))

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value.detach(), reduce_op="sum")

    # -- steps that are taken back -----------------------------------------------------------------------------------

    @contextmanager
    def _stepped(self, direction: Tensor) -> Iterator[float]:
        """The weights after a step as long as the update's; what makes a change of it a change per unit of eta."""
        norm, length = float(direction.norm()), float(self.moved.norm())
        step = direction * (length / norm) if norm else direction
        parts = step.split([parameter.numel() for parameter in self.parameters])
        stepped = [weight + part.view_as(weight) for weight, part in zip(self.start, parts, strict=True)]
        with self._at(stepped, back=self.start):
            yield norm / length if length else 0.0

    @contextmanager
    def _at(self, weights: Sequence[Tensor], back: Sequence[Tensor]) -> Iterator[None]:
        """The model with other weights for as long as it lasts, and then with those that it is to go back to."""
        try:
            self._place(weights)
            yield
        finally:
            self._place(back)

    def _place(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.data.copy_(weight)


def asymmetry(one: Tensor, other: Tensor) -> float:
    """``sum |a - b| / sum (|a| + |b|)``: 0 where both are alike, 1 where one is 0 or of the other sign.

    >>> asymmetry(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    0.2
    """
    total = float((one.abs() + other.abs()).sum())
    return float((one - other).abs().sum()) / total if total else 0.0


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors])
