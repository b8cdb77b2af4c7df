"""The pre-training of the embedded base: phases, optimizers, the loss over packed lessons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from cpt_lightning.models.attention import DenseMask
from cpt_lightning.models.qwen_vl import QwenVL, embed_prompts, hidden_states, output_weight
from cpt_lightning.models.tiny.lessons import make_lessons
from cpt_lightning.models.tiny.packing import GRID, MERGE, PackedLessons, Packer

FIRST_PHASE = {"scenes": 16, "charts": 5, "digit": 8, "word": 8, "polygon": 8, "arithmetic": 8, "facts": 4}
SHIFTED = {"word2": 2, "bars2": 2, "digit2": 2, "polygon2": 2, "single": 2}
"""Lessons of a step: scenes, charts, and single questions by family; the second phase adds the shifted ones."""


@dataclass(frozen=True)
class Phase:
    """A stretch of pre-training with one recipe, its learning rate falling linearly to zero after a short warm-up."""

    steps: int
    lr: float
    recipe: dict[str, int]
    warmup: int = 20

    def lr_factor(self, step: int) -> float:
        """Share of ``lr`` at a step of this phase."""
        return min((step + 1) / self.warmup, 1.0) * (1 - step / self.steps)


def pretrain(
    model: QwenVL,
    tokenizer: PreTrainedTokenizerBase,
    phases: list[Phase],
    seed: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs the phases one after the other, on fresh lessons at every step.

    Args:
        model: The model to train, in place.
        tokenizer: Its tokenizer.
        phases: What to train on, how long, how fast.
        seed: Of the lessons.
        after_step: Called with the number of steps done.
    """
    packer = Packer(tokenizer)
    total = sum(phase.steps for phase in phases)
    progress = tqdm(total=total, desc="pre-training", mininterval=5)
    done = 0
    for phase in phases:
        optimizers = make_optimizers(model, phase.lr)
        for step in range(phase.steps):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = phase.lr * phase.lr_factor(step)
            lessons = packer.pack(make_lessons(seed, done, phase.recipe))
            loss = lesson_loss(model, lessons)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            done += 1
            progress.update()
            if done % 10 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")
            after_step(done)
    progress.close()


def make_optimizers(model: QwenVL, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices within the blocks, AdamW for embeddings, norms, biases and the patch projection."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def lesson_loss(model: QwenVL, lessons: PackedLessons) -> Tensor:
    """Weighted mean negative log-probability of the learned tokens; the network in bfloat16, the loss in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = lesson_logits(model, lessons)
    losses = F.cross_entropy(logits.float(), lessons.predict[:, 2], reduction="none")
    return (losses * lessons.weights).sum() / lessons.weights.sum()


def lesson_logits(model: QwenVL, lessons: PackedLessons) -> Tensor:
    """``[M, V]`` logits where a learned token is predicted."""
    features = encode_toy_pictures(model, lessons.pixel_values)
    embeds = embed_prompts(model, lessons.input_ids, features)
    hidden = hidden_states(model, embeds, lessons.positions, DenseMask(lessons.allowed))
    row, column, _ = lessons.predict.unbind(dim=1)
    return F.linear(hidden[row, column], output_weight(model))


def encode_toy_pictures(model: QwenVL, pixel_values: Tensor) -> Tensor:
    """``[num_pictures * 9, H]`` features of toy pictures, all at once.

    The same as ``model.visual``, which attends picture by picture in a loop. A toy picture is one attention window, so
    windowed and full blocks are alike and a batched attention serves both.
    """
    visual: Any = model.model.visual
    grid = torch.tensor([[1, GRID, GRID]])
    hidden = visual.patch_embed(pixel_values)
    num_pictures = len(hidden) // GRID**2
    # Not visual.rotary_pos_emb(...), whose arguments changed between transformers 5.16 and 5.23.
    angles = (get_vision_position_ids(grid, MERGE).unsqueeze(-1) * visual.rotary_pos_emb.inv_freq).flatten(1)
    angles = torch.cat([angles, angles], dim=1).repeat(num_pictures, 1)
    cos, sin = angles.cos(), angles.sin()
    for block in visual.blocks:
        hidden = hidden + _attend(block.attn, block.norm1(hidden), num_pictures, cos, sin)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden)


def _attend(attention: Any, hidden: Tensor, num_pictures: int, cos: Tensor, sin: Tensor) -> Tensor:
    query, key, value = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(dim=1)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    by_picture = (num_pictures, GRID**2, attention.num_heads, -1)
    query, key, value = (x.view(by_picture).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(2, 3) * attention.scaling).softmax(dim=-1).to(value.dtype)
    return attention.proj((weights @ value).transpose(1, 2).reshape(len(hidden), -1))
