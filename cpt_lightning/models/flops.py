"""Floating-point operations of Qwen2.5-VL, counted from its configuration: two for each multiply-add.

Two counts are kept apart. *Executed* is what this code runs: a prompt and its image once per group, activations again
under gradient checkpointing, no gradient of frozen weights. *Equivalent* is what the textbook step needs for the same
result: every completion a sequence of its own, nothing computed twice. Norms, activations, softmax and the products of
low-rank adapters with what they are given are left out (1 % at 7B and rank 16).

Counts stay on the device where the lengths lie, in float64: a training step does not wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cpt_lightning.types import Completions, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL


@dataclass(frozen=True)
class Flops:
    """Operations of a piece of work.

    Args:
        executed: What is run.
        equivalent: What a naive computation of the same would run.
    """

    executed: Tensor | float = 0.0
    equivalent: Tensor | float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.executed + other.executed, self.equivalent + other.equivalent)


class FlopCounter:
    """Counts for one model; what of it is trained and checkpointed is read when it is made.

    Args:
        model: The backbone.
    """

    def __init__(self, model: QwenVL) -> None:
        self.text = model.config.text_config
        self.vision = model.config.vision_config
        visual = model.model.visual
        tower = [part for name, part in visual.named_children() if name != "merger"]
        # Pixels want no gradient, but what stands behind something that is trained hands its gradient on.
        self.tower_passes = _Passes.of(tower)
        self.merger_passes = _Passes.of([visual.merger], hands_on=self.tower_passes.backward > 0)
        self.text_passes = _Passes.of([model.model.language_model], hands_on=self.merger_passes.backward > 0)
        # See functional/logprobs.py: with a trained output matrix the logits are computed twice.
        self.logits_products = 4 if model.get_output_embeddings().weight.requires_grad else 2

    # -- pieces of work --------------------------------------------------------------------------------------------

    def sampled(self, prompts: Prompts, completions: Completions) -> Flops:
        """Of sampling groups: a pass over the prompts, then token by token."""
        lengths, tokens, images = self._sizes(prompts, completions)
        grown = (self._branch(lengths, tokens) + self._logits(tokens)).sum()
        executed = self._prompt(lengths).sum() + images.forward + grown
        equivalent = (self._branch(0, lengths + 1).sum() + images.forward) * tokens.shape[1] + grown
        return Flops(executed, equivalent)

    def scored(self, prompts: Prompts, completions: Completions, backward: bool = True) -> Flops:
        """Of scoring completions and going back; ``prompts.state`` and ``image_features`` spare their forward pass."""
        parts = (self.text_passes, self.tower_passes, self.merger_passes)
        text, *vision = parts if backward else [_Passes()] * 3
        runs_prompts = prompts.state is None
        runs_images = runs_prompts and prompts.image_features is None
        lengths, tokens, images = self._sizes(prompts, completions)
        executed = self._prompt(lengths).sum() * (runs_prompts + text.backward)
        executed += images.forward * runs_images + images.backward(*vision)
        executed += self._branch(lengths, tokens).sum() * (1 + text.backward)
        executed += self._logits(tokens).sum() * (self.logits_products if backward else 1)
        alone = (self._branch(0, lengths + tokens) + self._logits(tokens)).sum()
        of_images = images.forward + images.backward(*(part.without_checkpointing for part in vision))
        equivalent = alone * (1 + text.without_checkpointing.backward) + of_images * tokens.shape[1]
        return Flops(executed, equivalent)

    def _sizes(self, prompts: Prompts, completions: Completions) -> tuple[Tensor, Tensor, _Images]:
        """``[B, 1]`` tokens of the prompts, ``[B, G]`` of their completions, and all images."""
        tokens = completions.lengths.double().view(len(prompts), -1)
        return prompts.lengths.double()[:, None], tokens, self._images(prompts)

    # -- parts of the model ----------------------------------------------------------------------------------------

    def _prompt(self, tokens: Tensor) -> Tensor:
        """A prompt's forward pass; in the last layer only its last token goes beyond keys and values."""
        beyond = (self.text.num_hidden_layers - 1) * tokens + 1
        keys = self.text.num_hidden_layers * tokens
        pairs = (self.text.num_hidden_layers - 1) * tokens * (tokens + 1) / 2 + tokens
        return keys * self._per_key + beyond * self._per_query + pairs * self._per_pair

    def _branch(self, prompt: Tensor | int, tokens: Tensor) -> Tensor:
        """A completion's forward pass behind its prompt; its last token is no input."""
        inputs = (tokens - 1).clamp(min=0)
        pairs = inputs * prompt + inputs * (inputs + 1) / 2
        layers = self.text.num_hidden_layers
        return layers * (inputs * (self._per_key + self._per_query) + pairs * self._per_pair)

    @property
    def _head_dim(self) -> int:
        return self.text.hidden_size // self.text.num_attention_heads

    @property
    def _per_key(self) -> float:
        """Projections to key and value, of a token in a layer."""
        return 2 * self.text.hidden_size * 2 * self.text.num_key_value_heads * self._head_dim

    @property
    def _per_query(self) -> float:
        """Projection to the query and back, and the MLP, of a token in a layer."""
        return 2 * self.text.hidden_size * (2 * self.text.hidden_size + 3 * self.text.intermediate_size)

    @property
    def _per_pair(self) -> float:
        """Score and weighted value, of a query and a key in a layer."""
        return 4 * self.text.hidden_size

    def _logits(self, tokens: Tensor) -> Tensor:
        return 2 * tokens * self.text.hidden_size * self.text.vocab_size

    def _images(self, prompts: Prompts) -> _Images:
        """Forward pass of the vision tower over all images."""
        if prompts.image_grid_thw is None:
            return _Images()
        time, height, width = prompts.image_grid_thw.double().unbind(dim=1)
        vision, patches = self.vision, time * height * width
        merged = vision.spatial_merge_size**2
        patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        per_patch = 2 * patch_size * vision.hidden_size
        per_layer = 2 * vision.hidden_size * (4 * vision.hidden_size + 3 * vision.intermediate_size)
        per_token = 2 * vision.hidden_size * merged * (vision.hidden_size * merged + vision.out_hidden_size)
        num_full = len(vision.fullatt_block_indexes)
        side = vision.window_size // vision.patch_size
        pairs = num_full * time * (height * width) ** 2
        pairs += (vision.depth - num_full) * time * _squares(height, side) * _squares(width, side)
        blocks = patches * vision.depth * per_layer + 4 * vision.hidden_size * pairs
        return _Images((patches * per_patch).sum(), blocks.sum(), (patches / merged * per_token).sum())


@dataclass(frozen=True)
class _Images:
    """Forward of images: the embedding of patches, the blocks, the merger."""

    embedding: Tensor | float = 0.0
    blocks: Tensor | float = 0.0
    merger: Tensor | float = 0.0

    @property
    def forward(self) -> Tensor | float:
        return self.embedding + self.blocks + self.merger

    def backward(self, tower: _Passes, merger: _Passes) -> Tensor | float:
        """What it costs to go back; pixels want no gradient."""
        return self.embedding * tower.weight_gradient + self.blocks * tower.backward + self.merger * merger.backward


@dataclass(frozen=True)
class _Passes:
    """What a part's backward costs, in units of its forward.

    Args:
        weight_gradient: Share of its weights that are trained: these have a gradient to compute.
        backward: All of backward: gradients of inputs and of weights, and the forward again if it is checkpointed.
    """

    weight_gradient: float = 0.0
    backward: float = 0.0

    @property
    def without_checkpointing(self) -> _Passes:
        """The same with nothing computed again."""
        return _Passes(self.weight_gradient, 1 + self.weight_gradient if self.backward else 0.0)

    @classmethod
    def of(cls, parts: Sequence[nn.Module], hands_on: bool = False) -> _Passes:
        """Of parts that are run one after the other; ``hands_on`` says whether what they are given wants a gradient."""
        parameters = [each for part in parts for each in part.named_parameters()]
        trained = sum(weight.numel() for _, weight in parameters if weight.requires_grad)
        if not trained and not hands_on:
            return cls()
        total = sum(_num_weights(weight) for name, weight in parameters if "lora_" not in name)
        share = min(1.0, trained / total)
        modules = (module for part in parts for module in part.modules())
        return cls(share, 1 + share + any(getattr(module, "gradient_checkpointing", False) for module in modules))


def _num_weights(weight: Tensor) -> int:
    """How many weights a tensor stands for: of those in four bits a byte holds two."""
    quant_state = getattr(weight, "quant_state", None)
    return weight.numel() if quant_state is None else math.prod(quant_state.shape)


def _squares(length: Tensor, side: int) -> Tensor:
    """Sum of the squared sizes of the windows that ``length`` patches are cut into."""
    return length // side * side**2 + (length % side) ** 2
