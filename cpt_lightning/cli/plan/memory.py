"""What a run needs on a device, phase by phase: the engine's own code on a worst batch and weights without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning import Callback

from cpt_lightning.callbacks import Influence
from cpt_lightning.callbacks.filter.judge import Judge
from cpt_lightning.cli.plan.beside import phases_beside
from cpt_lightning.cli.plan.devices import Devices
from cpt_lightning.cli.plan.engine import WeightlessEngine
from cpt_lightning.cli.plan.phases import Phase, Plan, Workload
from cpt_lightning.cli.plan.standing import Standing
from cpt_lightning.cli.plan.weights import pixel_bytes
from cpt_lightning.cli.plan.worst_batch import full_completions
from cpt_lightning.models.adapters import has_adapters
from cpt_lightning.models.qwen_vl import encode_images, vision_is_frozen
from cpt_lightning.modules import MultiTask, PostTraining
from cpt_lightning.modules.group_rollouts import GroupRollouts
from cpt_lightning.rollouts import completion_logprobs, run_prompts
from cpt_lightning.types import Prompts


def make_plan(
    module: PostTraining,
    workload: Workload,
    devices: Devices,
    callbacks: Sequence[Callback] = (),
    judge: Judge | None = None,
) -> Plan:
    """Plans the memory of a run; nothing large is allocated.

    Args:
        module: What learns.
        workload: How large batches are.
        devices: Where they are.
        callbacks: Of the run; those of ours count that keep weights or look at the model.
        judge: The rollout filter's, if it judges rows.

    Raises:
        ValueError: Another engine samples, or gradients are measured for their influence: that is not known here.
    """
    if module.sampler is not None:
        raise ValueError(
            f"sampler={type(module.sampler).__name__}: what another engine takes is not planned; plan without it "
            "(--model.init_args.sampler null), and leave it its share of the GPU"
        )
    if any(isinstance(callback, Influence) and callback.exact for callback in callbacks):
        raise ValueError(
            "Influence: what exact=true takes, several copies of the trained weights among it, is not planned; plan "
            "with exact=false, or see what it takes by `cpt rehearse`"
        )
    engine = WeightlessEngine(module, workload, devices)
    standing = Standing(engine, callbacks)
    phases = [*_Planner(engine, standing).phases(), *phases_beside(engine, standing, callbacks, judge)]
    return Plan(sum(weight.numel() for weight in engine.model.parameters()), standing.num_trainable, phases)


class _Planner:
    """Runs steps and evaluations on a model without weights."""

    def __init__(self, engine: WeightlessEngine, standing: Standing) -> None:
        self.engine, self.standing = engine, standing
        self.module, self.workload, self.devices, self.model = (
            engine.module, engine.workload, engine.devices, engine.model
        )  # fmt: skip

    def phases(self) -> list[Phase]:
        """Of training and evaluation."""
        with self.engine.exchanging_block_by_block(self.module.ranks_go_back_alike):
            return [*self._training(), self._optimizer_step(), self._evaluation()]

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
        prompts = self.engine.prompts(num_prompts)
        with self.engine.counting() as live:
            self.engine.go_back(prompts, group_size, num_tokens, old_gradients)
        return self.standing.backward_phase(name, live.peak, prompts)

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
        prompts = whole = self.engine.prompts(num_prompts, sampling.prefix)
        with self.engine.counting() as live:
            if module.shares_prompt_pass(self.model):
                prompts = replace(prompts, state=run_prompts(self.model, prompts))
            elif vision_is_frozen(self.model):
                with torch.no_grad():
                    prompts = replace(prompts, image_features=encode_images(self.model, prompts))
            rows = prompts if sampled == num_prompts else prompts.select(range(sampled))
            cache = self.engine.sample(rows, group_size + module.samples_greedy, sampling)
            rollout = live.lap()
            rows = prompts if micro == num_prompts else prompts.select(range(micro))
            self.engine.go_back(rows, group_size, sampling.max_new_tokens, old)
            update = live.lap()
        kinds = {"KV_cache": cache, "activations_and_log_probs": rollout - cache, "batch": pixel_bytes(whole)}
        phases = [self.standing.phase("rollout", **kinds), self.standing.backward_phase("update", update, whole)]
        if self.devices.is_sharded and self.standing.reference and not has_adapters(self.model):
            phases.insert(1, self._reference(rows, whole, group_size, sampling.max_new_tokens))
        return phases

    def _reference(self, prompts: Prompts, whole: Prompts, group_size: int, num_tokens: int) -> Phase:
        """The reference scores the rollout, gathered beside the policy."""
        completions = full_completions(self.model, len(prompts) * group_size, num_tokens)
        with self.engine.counting() as live, torch.no_grad():
            completion_logprobs(self.model, replace(prompts, state=None), completions)
        gathers = ("policy", "reference")
        return self.standing.phase("reference", gathers, activations_and_log_probs=live.peak, batch=pixel_bytes(whole))

    def _optimizer_step(self) -> Phase:
        """Updates all weights at once, or one after the other."""
        at_once = (
            self.standing.num_trainable
            if self.devices.foreach
            else max(weight.numel() for weight in self.engine.trainable)
        )
        share = self.devices.world_size if self.devices.is_sharded else 1
        return self.standing.phase(
            "optimizer step",
            (),
            gradients=self.standing.share(self.standing.gradients),
            gradient_buckets=self.standing.buckets,
            optimizer_step=int(at_once * self.standing.optimizer.step / share),
        )

    def _evaluation(self) -> Phase:
        """Answers of a batch of rows."""
        sampling = self.module.evaluation
        prompts = self.engine.prompts(self.devices.share(self.workload.eval_prompts_per_step), sampling.prefix)
        with self.engine.counting() as live:
            cache = self.engine.sample(prompts, 1, sampling)
        return self.standing.phase(
            "evaluation",
            gradients=self.standing.left_gradients,
            gradient_buckets=self.standing.buckets,
            KV_cache=cache,
            activations_and_log_probs=live.peak - cache,
            batch=pixel_bytes(prompts),
        )
