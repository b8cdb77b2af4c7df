"""The frozen policy from which RFT, and SFT if it is to, are kept from straying."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from torch import nn

from cpt_lightning.models.adapters import adapters_off, has_adapters
from cpt_lightning.rollouts.sampling import sampling_mode

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

ReferenceKind = Literal["task_start", "base"]


class Reference(nn.Module):
    """The policy as it was when the task began, or as it was loaded.

    With LoRA the base costs nothing: it is the policy with its adapters switched off. Otherwise it is a frozen copy.

    Args:
        policy: The model that is tuned, as loaded.
        kind: ``task_start`` or ``base``.
    """

    def __init__(self, policy: QwenVL, kind: ReferenceKind):
        super().__init__()
        self.kind = kind
        is_policy_without_adapters = kind == "base" and has_adapters(policy)
        self.copy = None if is_policy_without_adapters else copy.deepcopy(policy).requires_grad_(False)

    def start_task(self, policy: QwenVL) -> None:
        """A task begins."""
        if self.kind == "task_start" and self.copy is not None:
            self.copy.load_state_dict(policy.state_dict())

    @contextmanager
    def model(self, policy: QwenVL) -> Iterator[QwenVL]:
        """The reference model, ready to score completions without gradients."""
        if self.copy is not None:
            with sampling_mode(self.copy):
                yield self.copy
        else:
            with sampling_mode(policy), adapters_off(policy):
                yield policy
