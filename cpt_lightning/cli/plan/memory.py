"""What a run needs on a device, phase by phase: the engine's own code on a worst batch and weights without data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cpt_lightning.cli.plan.devices import Devices
from cpt_lightning.cli.plan.phases import Phase, Plan, Workload
from cpt_lightning.cli.plan.weights import (
    OptimizerCost,
    bytes_of,
    pixel_bytes,
    storage_bytes,
    stored_bytes,
    weightless_model,
)
from cpt_lightning.cli.plan.worst_batch import full_completions, longest_prompts
from cpt_lightning.functional import forward_kl, kl_full
from cpt_lightning.functional.logprobs import token_logprobs
from cpt_lightning.models.adapters import adapter_weights, has_adapters
from cpt_lightning.models.memory import LiveBytes, counted, go_back, weight_bytes
from cpt_lightning.models.qwen_vl import (
    embed,
    encode_images,
    hidden_states,
    output_weight,
    vision_is_frozen,
)
from cpt_lightning.modules import RFT, MultiTask, PostTraining
from cpt_lightning.modules.group_rollouts import GroupRollouts
from cpt_lightning.modules.reference import HeldToReference
from cpt_lightning.rollouts import Sampling, completion_hidden, completion_logprobs, run_prompts
from cpt_lightning.rollouts.cache import GroupCache
from cpt_lightning.rollouts.sampling import casts_kept, sampling_mode
from cpt_lightning.types import Completions, Prompts


def make_plan(module: PostTraining, workload: Workload, devices: Devices) -> Plan:
    """Plans the memory of a run; nothing large is allocated.

    Raises:
        ValueError: Another engine samples, whose memory is not known here.
    """
    if module.sampler is not None:
        raise ValueError(
            f"sampler={type(module.sampler).__name__}: what another engine takes is not planned; plan without it "
            "(--model.init_args.sampler null), and leave it its share of the GPU"
        )
    return _Planner(module, workload, devices).plan()


class _Planner:
    """Runs the parts of a run on a model without weights."""

    def __init__(self, module: PostTraining, workload: Workload, devices: Devices) -> None:
        self.module, self.workload, self.devices = module, workload, devices
        self.model = weightless_model(module.backbone, devices)
        self.trainable = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.num_trainable = sum(weight.numel() for weight in self.trainable)
        self.dtype = self.trainable[0].dtype
        self.gradient_bytes = weight_bytes(self.model, trainable_only=True)
        self.optimizer = OptimizerCost.of(module, self.dtype, devices.foreach)
        self.exchanged = self._exchange_block_by_block() if devices.is_sharded and module.ranks_go_back_alike else []

    def plan(self) -> Plan:
        """All phases."""
        phases = [*self._training(), self._optimizer_step(), self._evaluation()]
        return Plan(sum(weight.numel() for weight in self.model.parameters()), self.num_trainable, phases)

    def _exchange_block_by_block(self) -> list[nn.Parameter]:
        """Lets go of decoder layers' gradients as they come, as ``fsdp2`` does; gives the weights concerned."""
        layers = self.model.model.language_model.layers
        exchanged = [weight for weight in layers.parameters() if weight.requires_grad]
        for weight in exchanged:
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        return exchanged

    # -- what is always there --------------------------------------------------------------------------------------

    def _phase(self, name: str, gathers: Sequence[str] = ("policy",), /, **kinds: int) -> Phase:
        """A part of the run, with what stands by; of shards, those of the models named are gathered meanwhile."""
        reference = self._reference_bytes()
        standing = {
            "weights": self._kept(stored_bytes(self.model, self.module.backbone)),
            "reference": self._kept(reference),
            "optimizer": self._kept(self.num_trainable * self.optimizer.state),
        }
        if self.devices.is_sharded:
            whole = {"policy": weight_bytes(self.model), "reference": reference}
            scale = (self.devices.autocast or self.dtype).itemsize / self.dtype.itemsize
            standing["gathered weights"] = int(sum(whole[model] for model in gathers) * scale)
        shown = {kind.replace("_", " "): size for kind, size in {**standing, **kinds}.items() if size}
        return Phase(name, shown)

    def _kept(self, whole: float) -> int:
        """A device's own share of what strategies spread."""
        if self.devices.is_offloaded:
            return 0
        return int(whole / self.devices.world_size if self.devices.is_sharded else whole)

    def _reference_bytes(self) -> int:
        """A second model, or second adapters."""
        if not isinstance(self.module, HeldToReference) or not self.module.kl_coef:
            return 0
        if not has_adapters(self.model):
            return weight_bytes(self.model)
        is_base = self.module.reference_kind == "base"
        return 0 if is_base else bytes_of(adapter_weights(self.model))

    @property
    def _buckets(self) -> int:
        """DDP exchanges gradients through copies."""
        return self.gradient_bytes if self.devices.strategy == "ddp" else 0

    # -- phases ----------------------------------------------------------------------------------------------------

    def _training(self) -> list[Phase]:
        num_prompts = self.devices.share(self.workload.prompts_per_step)
        if not isinstance(self.module, GroupRollouts):
            old = "forward" if self.workload.accumulate_grad_batches == 1 else "both"
            return [self._update("update", num_prompts, 1, self.workload.target_tokens, old_gradients=old)]
        phases = self._reinforced(self.module, num_prompts)
        if isinstance(self.module, MultiTask) and "sft" in {self.module.objective, *self.module.objectives.values()}:
            micro, old = self._micro_batch(self.module, num_prompts)
            phases.append(self._update("update (SFT)", micro, 1, self.workload.target_tokens, old_gradients=old))
        return phases

    def _update(self, name: str, num_prompts: int, group_size: int, num_tokens: int, old_gradients: str) -> Phase:
        prompts = self._prompts(num_prompts)
        with self._counting() as live:
            self._go_back(prompts, group_size, num_tokens, old_gradients)
        return self._update_phase(name, live.peak, prompts)

    def _update_phase(self, name: str, peak: int, prompts: Prompts) -> Phase:
        whole = min(self.gradient_bytes - bytes_of(self.exchanged), peak)
        in_exchange = 0
        if self.exchanged:
            # FSDP2 copies a layer's gradients before it exchanges them.
            in_exchange = bytes_of(self.exchanged) // len(self.model.model.language_model.layers)
        return self._phase(
            name,
            gradients=whole + self._kept(bytes_of(self.exchanged)),
            gradients_in_exchange=in_exchange,
            gradient_buckets=self._buckets,
            activations_and_log_probs=peak - whole,
            batch=pixel_bytes(prompts),
        )

    def _micro_batch(self, module: GroupRollouts, num_prompts: int) -> tuple[int, str]:
        """Prompts that go through backward at once, and when gradients of others are there already."""
        rows = -(-num_prompts // module.updates_per_rollout)
        micro = min(module.micro_batch_prompts or rows, rows)
        return micro, "both" if micro < rows else "none"

    def _reinforced(self, module: GroupRollouts, num_prompts: int) -> list[Phase]:
        """Rollout and update, one after the other: what the first keeps, the second finds."""
        group_size, sampling = module.group_size, module.sampling
        sampled = min(module.rollout_batch_prompts or num_prompts, num_prompts)
        micro, old = self._micro_batch(module, num_prompts)
        prompts = whole = self._prompts(num_prompts, sampling.prefix)
        with self._counting() as live:
            if module.shares_prompt_pass(self.model):
                prompts = replace(prompts, state=run_prompts(self.model, prompts))
            elif vision_is_frozen(self.model):
                with torch.no_grad():
                    prompts = replace(prompts, image_features=encode_images(self.model, prompts))
            rows = prompts if sampled == num_prompts else prompts.select(range(sampled))
            cache = self._sample(rows, group_size + module.samples_greedy, sampling)
            rollout = live.lap()
            rows = prompts if micro == num_prompts else prompts.select(range(micro))
            self._go_back(rows, group_size, sampling.max_new_tokens, old)
            update = live.lap()
        kinds = {"KV_cache": cache, "activations_and_log_probs": rollout - cache, "batch": pixel_bytes(whole)}
        phases = [self._phase("rollout", **kinds), self._update_phase("update", update, whole)]
        if self.devices.is_sharded and self._reference_bytes() and not has_adapters(self.model):
            phases.insert(1, self._reference(rows, whole, group_size, sampling.max_new_tokens))
        return phases

    def _reference(self, prompts: Prompts, whole: Prompts, group_size: int, num_tokens: int) -> Phase:
        """The reference scores the rollout, gathered beside the policy."""
        completions = full_completions(self.model, len(prompts) * group_size, num_tokens)
        with self._counting() as live, torch.no_grad():
            completion_logprobs(self.model, replace(prompts, state=None), completions)
        gathers = ("policy", "reference")
        return self._phase("reference", gathers, activations_and_log_probs=live.peak, batch=pixel_bytes(whole))

    def _optimizer_step(self) -> Phase:
        """Updates all weights at once, or one after the other."""
        at_once = self.num_trainable if self.devices.foreach else max(weight.numel() for weight in self.trainable)
        share = self.devices.world_size if self.devices.is_sharded else 1
        return self._phase(
            "optimizer step",
            (),
            gradients=self._kept(self.gradient_bytes),
            gradient_buckets=self._buckets,
            optimizer_step=int(at_once * self.optimizer.step / share),
        )

    def _evaluation(self) -> Phase:
        """Answers of a batch of rows; automatic optimization leaves the gradients of the last step lying."""
        sampling = self.module.evaluation
        prompts = self._prompts(self.devices.share(self.workload.eval_prompts_per_step), sampling.prefix)
        with self._counting() as live:
            cache = self._sample(prompts, 1, sampling)
        return self._phase(
            "evaluation",
            gradients=self._kept(self.gradient_bytes) if self.module.automatic_optimization else 0,
            gradient_buckets=self._buckets,
            KV_cache=cache,
            activations_and_log_probs=live.peak - cache,
            batch=pixel_bytes(prompts),
        )

    # -- the engine's code -----------------------------------------------------------------------------------------

    def _counting(self) -> AbstractContextManager[LiveBytes]:
        return counted(self.devices.autocast, self.model.parameters() if self.devices.is_sharded else ())

    def _prompts(self, num_prompts: int, prefix: str = "") -> Prompts:
        """The longest prompts, with what completions are made to begin with."""
        sizes = self.workload
        num_tokens = sizes.prompt_tokens + (len(self.module.processor.encode_prefix(prefix)) if prefix else 0)
        return longest_prompts(self.model, num_prompts, num_tokens, self.module.backbone.max_pixels, sizes.num_images)

    def _sample(self, prompts: Prompts, group_size: int, sampling: Sampling) -> int:
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

    def _go_back(self, prompts: Prompts, group_size: int, num_tokens: int, old_gradients: str) -> None:
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
