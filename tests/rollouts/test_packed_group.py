"""The packed group that is drawn is the one that is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpt_lightning.models.attention import DenseMask
from cpt_lightning.models.qwen_vl import embed_prompts, encode_images, hidden_states, output_weight
from cpt_lightning.rollouts import completion_logprobs, pack_group
from cpt_lightning.types import Completions


def completions_of(lengths: list[int]) -> Completions:
    ids = torch.arange(10, 10 + len(lengths) * max(lengths)).view(len(lengths), -1)
    return Completions(ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def test_a_prompt_of_text_and_three_completions(small_model, mixed_prompts):
    """Completions of 3, 1 and 2 tokens: behind the prompt a0 a1 and c0, for a2, b0 and c1 predict nothing.

    a0 and c0 go on at the position behind the prompt's last, a1 one further; a1 sees a0, and c0 neither of them.
    """
    prompts = mixed_prompts.select([1])
    group = pack_group(small_model, prompts, completions_of([3, 1, 2]))
    length = int(prompts.lengths)
    assert len(group) == length + 3
    assert group.ids.tolist() == [*prompts.input_ids[0].tolist(), 10, 11, 16]
    assert group.owners.tolist() == [0] * length + [1, 1, 3]
    assert not group.is_image.any()
    # Without an image the three parts of a position are the place in the text.
    assert group.positions.tolist() == [[*range(length), length, length + 1, length]] * 3
    assert group.sees[:length, :length].equal(torch.ones(length, length).tril().bool())
    assert not group.sees[:length, length:].any()
    assert group.sees[length:, :length].all()
    assert group.sees[length:, length:].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize("row", [0, 2], ids=["one image", "two images of unequal size"])
def test_its_mask_and_positions_give_the_log_probabilities_of_the_engine(small_model, mixed_prompts, row):
    """One dense forward over the packed row, under the mask and at the positions that are shown."""
    prompts, completions = mixed_prompts.select([row]), completions_of([4, 1, 6])
    group = pack_group(small_model, prompts, completions)
    assert int(group.is_image.sum()) == int(prompts.image_grid_thw.prod(dim=1).sum()) // 4
    with torch.no_grad():
        embeds = embed_prompts(small_model, group.ids[None], encode_images(small_model, prompts))
        mask = DenseMask(group.sees[None, None])
        logits = hidden_states(small_model, embeds, group.positions[:, None], mask)[0] @ output_weight(small_model).T
        logps = logits.log_softmax(dim=-1)
        expected = completion_logprobs(small_model, prompts, completions)
    for number, length in enumerate(completions.lengths.tolist()):
        own = (group.owners == number + 1).nonzero().flatten()
        before = torch.cat([prompts.lengths - 1, own])  # the prompt's last token predicts the completion's first
        found = logps[before].gather(1, completions.ids[number, :length, None]).squeeze(1)
        torch.testing.assert_close(found, expected[number, :length], atol=1e-5, rtol=1e-5)


def test_padding_before_the_prompt_has_no_place(small_model, mixed_prompts):
    """Beside longer prompts a prompt is padded; packed alone it is the same group."""
    prompts, completions = mixed_prompts.select([1]), completions_of([2, 2])
    width = prompts.input_ids.shape[1]
    padded = replace(
        prompts,
        input_ids=torch.cat([torch.zeros(1, 5, dtype=torch.long), prompts.input_ids], dim=1),
        attention_mask=torch.cat([torch.zeros(1, 5, dtype=torch.long), prompts.attention_mask], dim=1),
    )
    group, other = (pack_group(small_model, one, completions) for one in (prompts, padded))
    assert len(group) == width + 2
    for part, same in zip(vars(group).values(), vars(other).values(), strict=True):
        assert part.equal(same)


def test_completions_of_a_single_token_leave_the_prompt_alone_in_the_row(small_model, mixed_prompts):
    prompts = mixed_prompts.select([1])
    group = pack_group(small_model, prompts, completions_of([1, 1]))
    assert group.owners.tolist() == [0] * int(prompts.lengths)


def test_several_prompts_are_refused(small_model, mixed_prompts):
    with pytest.raises(ValueError, match=r"one prompt, not 4; choose one with prompts.select"):
        pack_group(small_model, mixed_prompts, completions_of([1, 1, 1, 1]))
