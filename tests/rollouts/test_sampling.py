"""Sampling agrees with transformers' generate, ends in time, and draws from the distribution it says."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpt_lightning.models import load_backbone
from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.rollouts import Sampling, completion_logprobs, sample_groups
from cpt_lightning.rollouts.sampling import keyed_generator
from cpt_lightning.types import Completions, Prompts

NONE = torch.tensor([], dtype=torch.long)


def generate(model: QwenVL, processor: PromptProcessor, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
    """transformers' greedy answer to each prompt, up to and including the token that ends it."""
    output = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        pixel_values=prompts.pixel_values,
        image_grid_thw=prompts.image_grid_thw,
        mm_token_type_ids=(prompts.input_ids == model.config.image_token_id).int(),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        suppress_tokens=processor.banned_token_ids,
        eos_token_id=processor.stop_token_ids,
        pad_token_id=processor.pad_token_id,
    )
    rows = []
    for ids in output[:, prompts.input_ids.shape[1] :].tolist():
        ends = [place for place, token in enumerate(ids) if token in processor.stop_token_ids]
        rows.append(ids[: ends[0] + 1] if ends else ids)
    return rows


def greedy(
    model: QwenVL, processor: PromptProcessor, prompts: Prompts, group_size: int, length: int
) -> list[list[int]]:
    completions = sample_groups(model, processor, prompts, group_size, Sampling(length, temperature=0))
    return [ids[mask].tolist() for ids, mask in zip(completions.ids, completions.mask, strict=True)]


def test_greedy_equals_transformers_generate_token_for_token(
    small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts
):
    """Left-padded prompts with one image, none and several; every member of a group gives the same."""
    expected = generate(small_model, processor, mixed_prompts, 12)
    assert len({tuple(row) for row in expected}) == len(expected), (
        "prompts must give different answers to tell them apart"
    )
    assert greedy(small_model, processor, mixed_prompts, 1, 12) == expected
    assert greedy(small_model, processor, mixed_prompts, 2, 12) == [row for row in expected for _ in range(2)]


def test_greedy_equals_generate_on_the_embedded_base(processor: PromptProcessor, mixed_prompts: Prompts):
    """The trained base ends its turns, so this also compares where completions stop."""
    model, _ = load_backbone("tiny")
    expected = generate(model.eval(), processor, mixed_prompts, 24)
    assert any(row[-1] == processor.eos_token_id for row in expected)
    assert greedy(model.train(), processor, mixed_prompts, 1, 24) == expected
    assert model.training, "sampling must leave the model in the mode it found it in"


def test_logps_of_sampled_tokens_are_those_of_the_packed_forward(
    small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts
):
    """Temperature included, top-k, top-p and bans not: what is drawn from is narrower than what is scored."""
    sampling = Sampling(8, temperature=0.7, top_p=0.9, top_k=20)
    completions = sample_groups(small_model, processor, mixed_prompts, 3, sampling, torch.Generator().manual_seed(0))
    with torch.no_grad():
        scored = completion_logprobs(small_model, mixed_prompts, completions, temperature=0.7)
    torch.testing.assert_close(completions.logps, scored, atol=1e-5, rtol=0)


def test_the_same_key_samples_the_same_and_another_key_something_else(
    small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts
):
    def draw(*key: int) -> list:
        return sample_groups(
            small_model, processor, mixed_prompts, 2, Sampling(6), keyed_generator("cpu", *key)
        ).ids.tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert draw(0, 1, 2) != draw(0, 2, 1)


def test_vision_tokens_are_never_sampled(processor: PromptProcessor):
    """Even where one has all the probability: logits of 100 on <|image_pad|> and 0 elsewhere."""
    logits = torch.zeros(50, len(processor.tokenizer))
    logits[:, processor.image_token_id] = 100.0
    for sampling in (Sampling(1), Sampling(1, temperature=0), Sampling(1, top_p=0.5, top_k=3)):
        tokens, _ = sampling.pick(logits, torch.tensor(processor.banned_token_ids), torch.rand(50))
        assert not set(tokens.tolist()) & set(processor.banned_token_ids)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    """Probabilities .5, .3, .15, .05: at top_p .6 the first two reach it, at .5 the first alone does."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, -1)
    drawn = Sampling(1, top_p=0.6).pick(logits, NONE, torch.rand(2000))[0]
    assert set(drawn.tolist()) == {0, 1}
    assert (drawn == 0).float().mean() == pytest.approx(0.5 / 0.8, abs=0.04)
    assert set(Sampling(1, top_p=0.5).pick(logits, NONE, torch.rand(2000))[0].tolist()) == {0}


def test_draws_follow_the_distribution_and_never_hit_probability_zero():
    """By hand: of .25, 0, .5, .25 the sums are .25, .25, .75, 1.

    So u = 0, .25, .74, .75 and nearly 1 draw 0, 2, 2, 3 and 3.
    """
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(5, -1)
    uniform = torch.tensor([0.0, 0.25, 0.74, 0.75, 1 - 2**-24])
    tokens, logps = Sampling(1).pick(logits, NONE, uniform)
    assert tokens.tolist() == [0, 2, 2, 3, 3]
    torch.testing.assert_close(logps.exp(), torch.tensor([0.25, 0.5, 0.5, 0.25, 0.25]))


def test_the_tail_of_a_large_vocabulary_is_drawn_by_its_exact_share():
    """Against sums of fractions: 150,000 tokens of probability 1e-10 behind one that has nearly all."""
    num_tail, tail = 150_000, 1e-10
    probability = torch.full((1, num_tail + 1), tail, dtype=torch.float32)
    probability[0, 0] = 1 - num_tail * tail
    exact = [Fraction(each) for each in probability[0].tolist()]
    total = sum(exact)
    for uniform in (1 - 2**-24, 1 - 2**-17, 1 - 7.4e-6):
        height = Fraction(float(torch.tensor(uniform))) * total
        wanted = next(token for token, below in enumerate(accumulate(exact)) if below > height)
        drawn = Sampling()._draw(probability.log(), torch.tensor([uniform]))
        # The logarithm is rounded, and with it all that stands before: a hundred-millionth of the whole.
        assert abs(int(drawn) - wanted) <= 1e-7 / tail, (uniform, wanted)


def test_values_that_are_no_numbers_are_no_place_behind_the_vocabulary(
    small_folder: Path, processor: PromptProcessor, mixed_prompts: Prompts
):
    """Which would end a GPU's process without a word of why; as it is the steps are skipped, and end in an error."""
    model, _ = load_backbone(str(small_folder))
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(torch.nan)
    for sampling in (Sampling(6), Sampling(6, top_p=0.9), Sampling(6, top_k=5), Sampling(6, temperature=0)):
        drawn = sample_groups(model, processor, mixed_prompts, 2, sampling)
        assert (drawn.ids >= 0).all() and (drawn.ids < model.config.text_config.vocab_size).all()
        assert drawn.logps[drawn.mask].isnan().all()


def test_top_k_keeps_the_k_most_probable():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(500, -1)
    drawn = Sampling(1, top_k=2).pick(logits, NONE, torch.rand(500))[0]
    assert set(drawn.tolist()) == {1, 3}


def test_decoding_stops_when_all_completions_have_ended(
    small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts, monkeypatch: pytest.MonkeyPatch
):
    """A model that ends its turn at once needs no forward beyond that over the prompts."""
    from cpt_lightning.rollouts import decoding

    calls = []
    real = decoding.hidden_states
    monkeypatch.setattr(decoding, "hidden_states", lambda *args: calls.append(1) or real(*args))
    ends = [processor.eos_token_id] * 4
    monkeypatch.setattr(Sampling, "_draw", lambda self, logps, uniform: torch.tensor(ends))
    completions = sample_groups(small_model, processor, mixed_prompts, 1, Sampling(100))
    assert completions.lengths.tolist() == [1, 1, 1, 1]
    assert len(calls) == 0


def test_finished_completions_leave_the_batch_and_the_others_stay_what_they_are(
    small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts, monkeypatch: pytest.MonkeyPatch
):
    """Every token below 170 ends a turn here, so completions end all the time; never dropping one gives the same."""
    from cpt_lightning.rollouts import decoding
    from cpt_lightning.rollouts import sampling as module

    monkeypatch.setattr(PromptProcessor, "stop_token_ids", property(lambda self: list(range(170))))
    sizes = []
    real = decoding.hidden_states
    monkeypatch.setattr(decoding, "hidden_states", lambda *args: sizes.append(args[1].shape[1]) or real(*args))

    def draw(kept_while_alive: float) -> Completions:
        monkeypatch.setattr(module, "KEPT_WHILE_ALIVE", kept_while_alive)
        sizes.clear()
        generator = torch.Generator().manual_seed(3)
        return sample_groups(small_model, processor, mixed_prompts, 4, Sampling(24), generator)

    never, sometimes = draw(0.0), draw(0.9)
    assert len(set(sizes[1:])) >= 3, "the batch must have shrunk more than once"
    assert sizes[-1] < 16
    assert sometimes.ids.tolist() == never.ids.tolist()
    torch.testing.assert_close(sometimes.logps, never.logps, atol=1e-5, rtol=0)


def test_what_a_prompt_draws_does_not_depend_on_which_prompts_stand_beside_it(
    small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts
):
    """So ``rollout_batch_prompts`` changes memory, not results."""

    def draw(parts: list[list[int]]) -> list:
        generator = torch.Generator().manual_seed(0)
        drawn = [
            sample_groups(small_model, processor, mixed_prompts.select(rows), 4, Sampling(6), generator)
            for rows in parts
        ]
        return Completions.cat(drawn, processor.pad_token_id).ids.tolist()

    assert draw([[0, 1, 2, 3]]) == draw([[0, 1], [2, 3]])


def test_the_image_is_encoded_once_per_prompt_whatever_the_group_size(
    small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts
):
    patches = []
    small_model.model.visual.register_forward_pre_hook(lambda module, args: patches.append(len(args[0])))
    sample_groups(small_model, processor, mixed_prompts, 5, Sampling(3))
    assert patches == [len(mixed_prompts.pixel_values)]


def test_a_prefix_is_forced_and_part_of_the_completion(
    small_model: QwenVL, processor: PromptProcessor, mixed_prompts: Prompts
):
    """With the prefix in the prompt instead, greedy goes on alike."""
    prefix = "<think>let me think</think><answer>"
    completions = sample_groups(small_model, processor, mixed_prompts, 1, Sampling(6, temperature=0, prefix=prefix))
    ids = torch.tensor(processor.tokenizer.encode(prefix, add_special_tokens=False))
    assert (completions.ids[:, : len(ids)] == ids).all()
    started = replace(
        mixed_prompts,
        input_ids=torch.cat([mixed_prompts.input_ids, ids.expand(4, -1)], dim=1),
        attention_mask=torch.cat([mixed_prompts.attention_mask, torch.ones(4, len(ids), dtype=torch.long)], dim=1),
    )
    rest = sample_groups(small_model, processor, started, 1, Sampling(6, temperature=0))
    assert (completions.ids[:, len(ids) :] == rest.ids).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_under_autocast_without_a_cache_weights_are_cast_once_and_gradients_come_out(
    small_model, processor, mixed_prompts
):
    """As Lightning's mixed precision has it; the casts of the rollout do not stand in the update's way."""
    weight = small_model.model.language_model.layers[0].mlp.up_proj.weight
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        casts = []
        for length in (3, 9):
            with CountCasts(weight.shape) as count:
                sample_groups(small_model, processor, mixed_prompts, 2, Sampling(length, temperature=0.1))
            casts.append(count.number)
        assert casts[0] == casts[1] > 0
        assert not torch.is_autocast_cache_enabled()
        completions = Completions(torch.tensor([[5, 6, 7]] * 8), torch.ones(8, 3, dtype=torch.bool))
        completion_logprobs(small_model, mixed_prompts, completions).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0


class CountCasts(TorchDispatchMode):
    """Counts conversions of tensors of a shape to bfloat16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.number = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.number += 1
        return func(*args, **(kwargs or {}))


def test_no_group_and_generators_for_others_than_the_prompts_are_refused(small_model, processor, mixed_prompts):
    with pytest.raises(ValueError, match="group_size=0 must be at least 1"):
        sample_groups(small_model, processor, mixed_prompts, 0, Sampling(2))
    two = [keyed_generator("cpu", row) for row in range(2)]
    assert len(mixed_prompts) == 4  # of which two generators would serve two each
    with pytest.raises(ValueError, match="2 generators for 4 prompts; give one for each, or one for all"):
        sample_groups(small_model, processor, mixed_prompts, 2, Sampling(2), two)
