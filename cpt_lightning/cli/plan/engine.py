"""The engine's own code on a worst batch and a model without weights; nothing large is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cpt_lightning.cli.plan.devices import Devices
from cpt_lightning.cli.plan.phases import Workload
from cpt_lightning.cli.plan.weights import storage_bytes, weightless_model
from cpt_lightning.cli.plan.worst_batch import full_completions, longest_prompts
from cpt_lightning.functional import divergences, forward_kl, kl_full
from cpt_lightning.functional.logprobs import token_logprobs
from cpt_lightning.models.memory import LiveBytes, counted, go_back
from cpt_lightning.models.qwen_vl import embed, hidden_states, output_weight
from cpt_lightning.modules import RFT, PostTraining
from cpt_lightning.rollouts import Sampling, completion_hidden, completion_logprobs, run_prompts
from cpt_lightning.rollouts.cache import GroupCache
from cpt_lightning.rollouts.sampling import casts_kept, sampling_mode
from cpt_lightning.types import Completions, Prompts


class WeightlessEngine:
    """Samples and goes back on a model without weights.

    Args:
        module: Whose model and objective these are.
        workload: How large batches are.
        devices: Where they are.
    """

    def __init__(self, module: PostTraining, workload: Workload, devices: Devices) -> None:
        self.module, self.workload, self.devices = module, workload, devices
        self.model = weightless_model(module.backbone, devices)
        self.trainable = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.exchanged: list[nn.Parameter] = []

    @contextmanager
    def exchanging_block_by_block(self, wanted: bool = True) -> Iterator[None]:
        """Under ``fsdp2`` decoder layers' gradients are let go of as they come, and their weights are ``exchanged``."""
        if self.devices.is_sharded and wanted:
            layers = self.model.model.language_model.layers
            self.exchanged = [weight for weight in layers.parameters() if weight.requires_grad]
        hooks = [
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
            for weight in self.exchanged
        ]
        yield
        for hook in hooks:
            hook.remove()
        self.exchanged = []

    def counting(self) -> AbstractContextManager[LiveBytes]:
        """Counts the bytes of what is computed within."""
        return counted(self.devices.autocast, self.model.parameters() if self.devices.is_sharded else ())

    def prompts(self, num_prompts: int, prefix: str = "") -> Prompts:
        """The longest prompts, with what completions are made to begin with."""
        sizes = self.workload
        num_tokens = sizes.prompt_tokens + (len(self.module.processor.encode_prefix(prefix)) if prefix else 0)
        return longest_prompts(self.model, num_prompts, num_tokens, self.module.backbone.max_pixels, sizes.num_images)

    def sample(self, prompts: Prompts, group_size: int, sampling: Sampling) -> int:
        """The prompts, and the last step of decoding, which sees all keys; gives the bytes of keys and values."""
        with sampling_mode(self.model), casts_kept(torch.device("cpu")):
            state = run_prompts(self.model, prompts) if prompts.state is None else prompts.state
            cache = GroupCache(prompts, state, group_size, sampling.max_new_tokens)
            cache.length = sampling.max_new_tokens - 1
            hidden = state.hidden.repeat_interleave(group_size, dim=0)
            positions = state.next_position.repeat_interleave(group_size).expand(3, 1, -1)
            ids = full_completions(self.model, 1, len(hidden)).ids
            hidden = hidden_states(self.model, embed(self.model, ids), positions, cache)[0]
            logits = linear(hidden, output_weight(self.model)).float()
            sampling.pick(logits, ids.new_zeros(1), torch.empty(len(hidden), device="meta"))
        room = [*cache.prompts, *cache.completions, *zip(state.keys, state.values, strict=True)]
        return storage_bytes([tensor for pair in room for tensor in pair])

    def go_back(self, prompts: Prompts, group_size: int, num_tokens: int, old_gradients: str = "none") -> None:
        """Scores full completions and goes back; gradients may be there already, while scoring or all along."""
        completions = full_completions(self.model, len(prompts) * group_size, num_tokens)
        if old_gradients != "none":
            waiting = set(self.trainable) - set(self.exchanged)
            for weight in waiting:
                weight.grad = torch.empty_like(weight)
        by_logprobs = partial(completion_logprobs, self.model)
        score = by_logprobs if self.module.learns_by_logprobs else self._held_to_reference
        loss = score(prompts, completions).sum()
        if old_gradients == "forward":
            self.model.zero_grad()
        go_back(loss)
        self.model.zero_grad()

    def _held_to_reference(self, prompts: Prompts, completions: Completions) -> Tensor:
        """Log-probabilities and divergence, as ``HeldToReference`` computes them; the reference costs no gradient."""
        with torch.no_grad():
            reference = completion_hidden(self.model, replace(prompts, state=None), completions)
        hidden, weight = completion_hidden(self.model, prompts, completions), output_weight(self.model)
        divergence = kl_full if isinstance(self.module, RFT) else forward_kl
        kl = divergence(hidden, weight, reference, weight.detach(), 1.0)
        return token_logprobs(hidden, weight, completions.ids[completions.mask]) + kl

    @torch.no_grad()
    def compare_with_base(self, prompts: Prompts, sampling: Sampling) -> None:
        """An answer of the policy and one of the base to each prompt, and how both models' tokens diverge."""
        answers = full_completions(self.model, 2 * len(prompts), sampling.max_new_tokens)
        with sampling_mode(self.model):
            known = replace(prompts, state=run_prompts(self.model, prompts))
            self.sample(known, 1, sampling)
            hidden = completion_hidden(self.model, known, answers)
            of_base = completion_hidden(self.model, prompts, answers)
            weight = output_weight(self.model)
            divergences(hidden, weight, of_base, weight)
