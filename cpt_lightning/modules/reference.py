"""The frozen policy from which RFT, and SFT if it is to, are kept from straying."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from cpt_lightning.functional.logprobs import token_logprobs
from cpt_lightning.models.adapters import adapter_weights, adapters_off, adapters_replaced, has_adapters
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.models.sharding import gather, is_sharded, release, whole
from cpt_lightning.modules.base import PostTraining
from cpt_lightning.modules.compatibility import KEY
from cpt_lightning.rollouts import completion_hidden
from cpt_lightning.rollouts.sampling import sampling_mode
from cpt_lightning.tasks.checks import check_known
from cpt_lightning.types import Completions, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

ReferenceKind = Literal["task_start", "base", "synchronised"]


Divergence = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""``[M]`` from the hidden states and output matrices of policy and reference, and the temperature."""


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
            frozen = (nn.Parameter(_kept(weight), requires_grad=False) for weight in adapter_weights(policy))
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
                kept.data.copy_(whole(weight.data))

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


def _kept(weight: Tensor) -> Tensor:
    """A copy; zeros of a weight that another rank has, which the task's start or a checkpoint will fill."""
    # Not on the meta device: Lightning's strategy would take the whole module for one without weights.
    return torch.zeros(weight.shape, dtype=weight.dtype) if weight.is_meta else whole(weight.detach()).clone()


class HeldToReference(PostTraining):
    """For objectives that may be held to a frozen policy by a KL term.

    Args:
        kl_coef: Weight of the divergence from the reference; 0 needs no reference.
        reference: The policy that is not to be left: ``task_start`` as it was when the task began, which is after the
            task before (paper A), ``base`` as it was loaded, ``synchronised`` (RFT) as it was not long ago.
        **kwargs: Options of :class:`PostTraining`.
    """

    def __init__(self, kl_coef: float = 0.0, reference: ReferenceKind = "task_start", **kwargs):
        super().__init__(**kwargs)
        check_known(reference=(reference, ReferenceKind))
        if kl_coef < 0:
            raise ValueError(f"kl_coef={kl_coef} must not be negative")
        if kl_coef and reference == "base" and self.along_stream == "renewed":
            raise ValueError(
                "reference=base: with backbone.lora.along_stream=renewed adapters are merged into the base; set "
                "reference to task_start, or along_stream to shared or per_task"
            )
        self.kl_coef = kl_coef
        self.reference_kind: ReferenceKind = reference

    def configure_model(self) -> None:
        """Loads the backbone, and for training the reference if the KL term needs one."""
        super().configure_model()
        is_fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if self.kl_coef and is_fitting and "reference" not in self._modules:
            # What is in shards cannot be copied: then the reference is loaded like the policy.
            policy = self.load_model() if is_sharded(self.model) and not has_adapters(self.model) else self.model
            self.reference = Reference(policy, self.reference_kind)

    def check_checkpoint(self, where: str, checkpoint: Mapping[str, Any], is_fitting: bool) -> None:
        """Looks for the reference too, if there is to be one."""
        super().check_checkpoint(where, checkpoint, is_fitting)
        before = checkpoint[KEY].get("reference", self.reference_kind)  # earlier checkpoints do not say
        if not (is_fitting and self.kl_coef) or before == self.reference_kind:
            return
        if before is None and self.reference_kind == "base" and self.backbone.tuning != "full":
            return  # the policy without its adapters, of which no checkpoint holds anything
        option, now = ("kl_coef", self.kl_coef) if before is None else ("reference", self.reference_kind)
        raise ValueError(
            f"{where} was written with {option}={before or 0}, now it is {now}: it does not hold the reference that "
            f"the KL term needs; restore {option}, or begin a new run from the model: `cpt export` it, and name the "
            "folder as backbone.path"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds which reference is among the weights."""
        super().on_save_checkpoint(checkpoint)
        if KEY in checkpoint:
            checkpoint[KEY]["reference"] = self.reference_kind if self.kl_coef else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the reference out where there is none: to evaluate, or to go on without a KL term."""
        weights = checkpoint.get("state_dict")
        if weights is not None and "reference" not in self._modules:
            checkpoint["state_dict"] = {k: weights[k] for k in weights if not k.startswith("reference.")}
        super().on_load_checkpoint(checkpoint)

    def on_train_epoch_start(self) -> None:
        """A task begins, and the reference with it; one that is resumed half-way does not come here."""
        super().on_train_epoch_start()
        if self.kl_coef:
            self.reference.renew(self.model)

    def logps_and_divergence(
        self, prompts: Prompts, completions: Completions, divergence: Divergence, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """``[N, T]`` log-probabilities by the policy, and its divergence from the reference; one pass of each model."""
        self.account.add_flops(self.flops.scored(prompts, completions))
        self.account.add_flops(self.flops.scored(replace(prompts, state=None), completions, backward=False))
        with self.reference.model(self.model) as reference:
            ref_hidden = completion_hidden(reference, replace(prompts, state=None), completions)
            ref_weight = output_weight(reference).detach()
            # Backward looks at it again, when the reference is back in shards.
            ref_weight = ref_weight.clone() if is_sharded(reference) else ref_weight
        hidden, weight = completion_hidden(self.model, prompts, completions), output_weight(self.model)
        logps = token_logprobs(hidden, weight, completions.ids[completions.mask], temperature)
        kl = divergence(hidden, weight, ref_hidden, ref_weight, temperature)
        return completions.unpacked(logps), completions.unpacked(kl)
