"""The batches that travel between data, modules and callbacks, a shape beside every field.

Shape letters, the same everywhere: B prompts, G completions of one prompt (its group), N = B * G completions, P prompt
tokens (left-padded), T completion tokens (right-padded), S = P + T, V vocabulary, H hidden size, K tasks.
Log-probabilities are in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from PIL.Image import Image

T = TypeVar("T", bound="DataclassInstance")

Gold = str | list[str]
"""One reference answer, or several that are all right (VQA sets carry ten human answers)."""

RewardFunction = Callable[[str, Gold], dict[str, float]]
"""``(completion, gold) -> {"total": ..., "accuracy": ..., "format": ...}``; "total" is what RFT maximises."""


@dataclass
class Example:
    """One row of a task, as it is asked of the model and graded: all that a module may know of it.

    Args:
        task: Name of the task the row belongs to.
        row_id: Names the row in errors and result files: ``"<source>/<split>/<index>"`` or ``"<file>:<row>"``.
        messages: The prompt in chat form (system and user turns); an image stands as ``{"type": "image"}``.
        images: The prompt's images in order, RGB; emptied by the collate function once they are pixels.
        gold: Reference answer(s).
        target: Completion that SFT learns; ``None`` where the source has none.
        target_ids: Token ids of that completion, where it was sampled and is learned exactly as it was.
        reward: Scores a completion of this row.
    """

    task: str
    row_id: str
    messages: list[dict]
    gold: Gold
    reward: RewardFunction
    images: list[Image] = field(default_factory=list)
    target: str | None = None
    target_ids: list[int] | None = None


@dataclass
class PromptState:
    """What the language model made of B prompts: all that completions need to go on from them.

    Args:
        keys: Per layer ``[B, kv_heads, P, D]``; what stands on the padding has no meaning.
        values: The same of values.
        hidden: ``[B, H]`` final hidden state of each prompt's last token.
        next_position: ``[B]`` M-RoPE position of a completion's first token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor
    next_position: Tensor

    def select(self, index: Tensor, padding: int) -> PromptState:
        """Of the given prompts, without the first ``padding`` columns."""
        # index_select: the backward of advanced indexing adds up element by element on the CPU.
        keys, values = (
            [layer.index_select(0, index)[:, :, padding:] for layer in layers] for layers in (self.keys, self.values)
        )
        return PromptState(keys, values, self.hidden.index_select(0, index), self.next_position[index])


@dataclass
class Prompts:
    """B prompts with their images, left-padded.

    Args:
        input_ids: ``[B, P]`` token ids; every image stands as its run of ``<|image_pad|>`` tokens.
        attention_mask: ``[B, P]`` 1 for tokens, 0 for padding.
        images_per_prompt: B counts, 0 for a text-only prompt.
        pixel_values: ``[num_patches, patch_dim]`` of all images in order, or ``None`` if the batch has no image.
        image_grid_thw: ``[num_images, 3]`` patches per image along time, height and width, on the CPU; or ``None``.
        image_features: ``[num_image_tokens, H]`` what the vision tower made of the pixels, where that is kept.
        state: What the language model made of the prompts, where that is kept; then nothing of them is computed again.
        examples: The B rows behind the prompts.
        valid: ``[B]`` bool; ``False`` marks a row that only fills up a rank's share and must not be counted.
    """

    input_ids: Tensor
    attention_mask: Tensor
    images_per_prompt: list[int]
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    image_features: Tensor | None = None
    state: PromptState | None = None
    examples: list[Example] = field(default_factory=list)
    valid: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def device(self) -> torch.device:
        """Where the token ids live."""
        return self.input_ids.device

    @property
    def lengths(self) -> Tensor:
        """``[B]`` prompt tokens without padding."""
        return self.attention_mask.sum(dim=1)

    def to(self, device: torch.device | str, **kwargs) -> Self:
        """A copy with its tensors on ``device``, but for ``image_grid_thw``: sizes are for the host to know."""
        return replace(_tensors_to(self, device, **kwargs), image_grid_thw=self.image_grid_thw)

    def pin_memory(self) -> Self:
        """A copy that a GPU can fetch while the CPU goes on; torch's loaders ask for it."""
        return _of_tensors(self, Tensor.pin_memory)

    def select(self, rows: Sequence[int]) -> Prompts:
        """The prompts of the given rows, with their images, without needless left padding; of all rows no copy."""
        rows = list(rows)
        if rows == list(range(len(self))):
            return replace(self)
        index = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        mask = self.attention_mask[index]
        padding = self.input_ids.shape[1] - int(mask.sum(dim=1).max()) if rows else 0
        return Prompts(
            input_ids=self.input_ids[index, padding:],
            attention_mask=mask[:, padding:],
            images_per_prompt=[self.images_per_prompt[row] for row in rows],
            **self._select_images(rows),
            state=None if self.state is None else self.state.select(index, padding),
            examples=[self.examples[row] for row in rows] if self.examples else [],
            valid=None if self.valid is None else self.valid[index],
        )

    def _select_images(self, rows: list[int]) -> dict[str, Tensor | None]:
        has_image = any(self.images_per_prompt[row] for row in rows)
        if self.pixel_values is None or self.image_grid_thw is None or not has_image:
            return {}
        grids = self.image_grid_thw.split(self.images_per_prompt)
        of_images = iter(self.image_grid_thw.prod(dim=1).tolist())
        patches = [sum(itertools.islice(of_images, count)) for count in self.images_per_prompt]
        chosen = {"pixel_values": self.pixel_values.split(patches), "image_grid_thw": grids}
        if self.image_features is not None:
            patches_per_token = len(self.pixel_values) // len(self.image_features)
            chosen["image_features"] = self.image_features.split([count // patches_per_token for count in patches])
        return {name: torch.cat([parts[row] for row in rows]) for name, parts in chosen.items()}


@dataclass
class Completions:
    """N completions, right-padded; those of one prompt stand together, so row ``b * G + g`` answers prompt ``b``.

    Args:
        ids: ``[N, T]`` token ids.
        mask: ``[N, T]`` bool, true up to and including the end-of-turn token.
        logps: ``[N, T]`` log-probability of each token under the policy that sampled it (temperature applied, before
            top-k and top-p), 0 where masked; ``None`` if the completions were not sampled.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """``[N]`` tokens of each completion, its end-of-turn token included."""
        return self.mask.sum(dim=1)

    def ended(self, stop_token_ids: Sequence[int]) -> Tensor:
        """``[N]`` bool, whether each came to its end rather than being cut off."""
        return (torch.isin(self.ids, self.ids.new_tensor(stop_token_ids)) & self.mask).any(dim=1)

    def to(self, device: torch.device | str, **kwargs) -> Self:
        """A copy with its tensors on ``device``."""
        return _tensors_to(self, device, **kwargs)

    def pin_memory(self) -> Self:
        """A copy that a GPU can fetch while the CPU goes on; torch's loaders ask for it."""
        return _of_tensors(self, Tensor.pin_memory)

    def select(self, rows: Sequence[int]) -> Completions:
        """The given completions, without needless right padding."""
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.ids.device)
        mask = self.mask[index]
        length = max(1, int(mask.sum(dim=1).max())) if len(index) else 0
        logps = None if self.logps is None else self.logps[index, :length]
        return Completions(self.ids[index, :length], mask[:, :length], logps)

    def unpacked(self, values: Tensor) -> Tensor:
        """``[N, T]`` of values ``[M]`` of the M tokens in a row, 0 where masked; carries the gradient."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    @staticmethod
    def cat(parts: Sequence[Completions], pad_id: int) -> Completions:
        """The completions of all parts in order, padded to the longest; log-probabilities if all parts have them."""
        length = max(part.ids.shape[1] for part in parts)

        def padded(tensors: Sequence[Tensor], value: float) -> Tensor:
            return torch.cat([pad(tensor, (0, length - tensor.shape[1]), value=value) for tensor in tensors])

        logps = [part.logps for part in parts if part.logps is not None]
        return Completions(
            padded([part.ids for part in parts], pad_id),
            padded([part.mask for part in parts], False),
            padded(logps, 0.0) if len(logps) == len(parts) else None,
        )


@dataclass
class Scored:
    """Completions that an objective is about to learn from, as it scored them.

    Args:
        prompts: B prompts.
        completions: N completions, group by group.
        hidden: ``[M, H]`` final hidden states that predict their M tokens, without the graph.
        logps: ``[M]`` log-probabilities of these, in the graph of the loss.
        temperature: That divided the logits.
    """

    prompts: Prompts
    completions: Completions
    hidden: Tensor
    logps: Tensor
    temperature: float


@dataclass
class Batch:
    """What a data loader yields: prompts and, for training rows that have one, the reference completion (G = 1).

    Args:
        prompts: B prompts.
        targets: B reference completions for SFT, or ``None`` (evaluation; RFT on rows without a target).
        num_skipped: Rows left out because their prompt was longer than the limit or an image was refused; in
            evaluation those that keep their place as invalid filler.
    """

    prompts: Prompts
    targets: Completions | None = None
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def required_targets(self) -> Completions:
        """The reference completions.

        Raises:
            ValueError: A row has none; names it.
        """
        if self.targets is None:
            row = next((example for example in self.prompts.examples if example.target is None), None)
            where = f"row {row.row_id} of task {row.task!r}" if row else "this batch"
            raise ValueError(
                f"{where} has no target to learn by SFT: give its task a `target` template, e.g. '{{answer}}'"
            )
        return self.targets

    def select(self, rows: Sequence[int]) -> Batch:
        """The batch of the given rows."""
        return Batch(self.prompts.select(rows), None if self.targets is None else self.targets.select(rows))

    def to(self, device: torch.device | str, **kwargs) -> Self:
        """A copy with its tensors on ``device``."""
        targets = None if self.targets is None else self.targets.to(device, **kwargs)
        return replace(self, prompts=self.prompts.to(device, **kwargs), targets=targets)

    def pin_memory(self) -> Self:
        """A copy that a GPU can fetch while the CPU goes on; torch's loaders ask for it."""
        targets = None if self.targets is None else self.targets.pin_memory()
        return replace(self, prompts=self.prompts.pin_memory(), targets=targets)


@dataclass
class Rollout:
    """B prompts, a group of G completions of each, and what they earned.

    Args:
        prompts: B prompts.
        completions: N = B * G completions.
        texts: N decoded completions.
        rewards: ``[B, G]`` total reward, float32.
        reward_parts: Named parts of the reward (``"accuracy"``, ``"format"``), each ``[B, G]``; ``nan`` where a row's
            task has no such part.
        learned: ``[B, G]`` bool, completions that updates learn from; ``None`` if all are.
        greedy_rewards: ``[B]`` total reward of each prompt's most probable completion, where that was asked for.
        scores: N named scores, as the completions' own rewards gave them.
        counts: ``False`` for one that is sampled so that a rank without rows keeps in step with the others: neither
            loss nor log know of it.
    """

    prompts: Prompts
    completions: Completions
    texts: list[str]
    rewards: Tensor
    reward_parts: dict[str, Tensor]
    learned: Tensor | None = None
    greedy_rewards: Tensor | None = None
    scores: list[dict[str, float]] = field(default_factory=list)
    counts: bool = True

    @property
    def group_size(self) -> int:
        """G, the completions of each prompt."""
        return self.rewards.shape[1]

    def completions_of(self, rows: Sequence[int]) -> list[int]:
        """The completions of the given prompts."""
        return [row * self.group_size + member for row in rows for member in range(self.group_size)]

    def select(self, rows: Sequence[int]) -> Rollout:
        """The groups of the given prompts."""
        completions = self.completions_of(rows)
        index = torch.as_tensor(list(rows), dtype=torch.long, device=self.rewards.device)
        return Rollout(
            self.prompts.select(rows),
            self.completions.select(completions),
            [self.texts[completion] for completion in completions],
            self.rewards[index],
            {name: part[index] for name, part in self.reward_parts.items()},
            None if self.learned is None else self.learned[index],
            None if self.greedy_rewards is None else self.greedy_rewards[index],
            [self.scores[completion] for completion in completions] if self.scores else [],
            self.counts,
        )


@dataclass
class Evaluation:
    """What the model said to one batch of rows, and what it was worth.

    Args:
        examples: B rows; one that was answered G times stands here G times.
        texts: B completions.
        scores: B named scores, ``"accuracy"`` and ``"total"`` among them.
        valid: ``[B]`` whether the row counts; the others only fill up a rank's share.
        completions: B completions in tokens, where these are to be kept.
    """

    examples: list[Example]
    texts: list[str]
    scores: list[dict[str, float]]
    valid: list[bool]
    completions: Completions | None = None


def _tensors_to(batch: T, device: torch.device | str, **kwargs) -> T:
    is_gpu = torch.device(device).type != "cpu"  # which fetches what is pinned while the CPU goes on
    return _of_tensors(batch, lambda tensor: tensor.to(device, **{"non_blocking": is_gpu, **kwargs}))


def _of_tensors(batch: T, change: Callable[[Tensor], Tensor]) -> T:
    changed = {name: change(value) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **changed)
