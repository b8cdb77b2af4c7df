"""A plain GRPO loop: every completion has a prompt and an image of its own, and the logits of all positions exist.

What one writes first with transformers alone. It lives here only, for comparison.
"""

from __future__ import annotations

import torch
from measure import StepMeter
from torch import Tensor
from workload import CLIP_HIGH, CLIP_LOW, MAX_GRAD_NORM, Workload, make_optimizer, reward

from cpt_lightning.data.collate import Collate
from cpt_lightning.functional import clipped_policy_loss, group_normalized_advantages, token_weights
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.types import Prompts


def grpo(workload: Workload) -> dict[str, float]:
    """Measures GRPO steps."""
    model, processor = workload.backbone.load_model(), workload.backbone.load_processor()
    collate, examples = Collate(processor), workload.examples(processor)
    optimizer = make_optimizer(model.parameters())
    meter = StepMeter(workload.device, workload.warm_up)
    for _ in range(workload.num_steps):
        prompts = repeated(collate(examples).prompts.to(workload.device), workload.group_size)
        ids = generate(model, processor, prompts, workload.new_tokens)
        completions = ids[:, prompts.input_ids.shape[1] :]
        workload.check_lengths([completions.shape[1]] * len(completions))
        texts = processor.tokenizer.batch_decode(completions)
        rewards = torch.tensor([reward(text, "")["total"] for text in texts], device=ids.device)
        meter.end("rollout")
        for rows in torch.arange(len(ids)).split(workload.micro_size):
            logps = logprobs(model, prompts.select(rows.tolist()), ids[rows])[:, -workload.new_tokens :]
            loss = policy_loss(logps, rewards[rows].view(-1, workload.group_size))
            (loss * len(rows) / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        meter.end("update")
    return meter.results()


def repeated(prompts: Prompts, group_size: int) -> Prompts:
    """Every prompt ``group_size`` times, with its image."""
    return prompts.select([row for row in range(len(prompts)) for _ in range(group_size)])


@torch.no_grad()
def generate(model: QwenVL, processor: PromptProcessor, prompts: Prompts, new_tokens: int, **options) -> Tensor:
    """``[N, P + T]`` prompts and what transformers samples after them."""
    model.eval()
    ids = model.generate(
        **model_inputs(model, prompts, prompts.input_ids),
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        suppress_tokens=processor.banned_token_ids,
        pad_token_id=processor.pad_token_id,
        **options,
    )
    model.train()
    return ids


def logprobs(model: QwenVL, prompts: Prompts, ids: Tensor) -> Tensor:
    """``[N, P + T - 1]`` log-probabilities of every token but the first."""
    logits = model(**model_inputs(model, prompts, ids), use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)


def model_inputs(model: QwenVL, prompts: Prompts, ids: Tensor) -> dict[str, Tensor]:
    """What transformers' forward takes; the prompts of a workload are of one length, without padding."""
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": prompts.pixel_values,
        "image_grid_thw": None if prompts.image_grid_thw is None else prompts.image_grid_thw.to(ids.device),
    }


def policy_loss(logps: Tensor, rewards: Tensor) -> Tensor:
    """The loss of one on-policy update, from ``[N, T]`` log-probabilities and ``[B, G]`` rewards."""
    mask = torch.ones_like(logps, dtype=torch.bool)
    advantages = group_normalized_advantages(rewards, "std").flatten()
    weights = token_weights(mask, "token_mean")
    return clipped_policy_loss(logps, logps.detach(), advantages, mask, weights, CLIP_LOW, CLIP_HIGH)[0]
