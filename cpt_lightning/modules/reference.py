"""The frozen policy from which RFT is kept from straying."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from torch import nn

from cpt_lightning.models.adapters import adapter_weights, adapters_off, adapters_replaced, has_adapters
from cpt_lightning.models.sharding import gather, release, whole
from cpt_lightning.rollouts.sampling import sampling_mode

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

ReferenceKind = Literal["task_start", "base", "synchronised"]


class Reference(nn.Module):
    """The policy as it was when the task began, as it was loaded, or as it was not long ago.

    With adapters it costs no second model: the base is the policy with its adapters switched off, the policy at the
    task's start is the policy with the adapters of then. Without, it is a frozen copy.

    Args:
        policy: The model that is tuned, as loaded.
        kind: ``base`` never changes; the others are renewed when their owner says so.
    """

    def __init__(self, policy: QwenVL, kind: ReferenceKind):
        super().__init__()
        self.kind = kind
        self.copy = None if has_adapters(policy) else copy.deepcopy(policy).requires_grad_(False)
        self.adapters: nn.ParameterList | None = None
        if has_adapters(policy) and kind != "base":
            frozen = (nn.Parameter(whole(weight.detach()).clone(), False) for weight in adapter_weights(policy))
            self.adapters = nn.ParameterList(frozen)

    def renew(self, policy: QwenVL) -> None:
        """The policy of now is the reference from here on, unless that is the base."""
        if self.kind == "base":
            return
        if self.copy is not None:
            release(self.copy)
            self.copy.load_state_dict(policy.state_dict())
        if self.adapters is not None:
            for kept, weight in zip(self.adapters, adapter_weights(policy), strict=True):
                kept.data.copy_(weight.data)

    @contextmanager
    def model(self, policy: QwenVL) -> Iterator[QwenVL]:
        """The reference model, ready to score completions without gradients."""
        if self.copy is not None:
            gather(self.copy)
            with sampling_mode(self.copy):
                yield self.copy
            release(self.copy)
            return
        then = adapters_off(policy) if self.adapters is None else adapters_replaced(policy, self.adapters)
        with sampling_mode(policy), then:
            yield policy
