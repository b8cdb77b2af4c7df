"""Prompts hold the tokens and patches that transformers' own processing gives, and errors name the row."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cpt_lightning.models.processor import PromptProcessor

WITH_IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
TEXT_ONLY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]


@pytest.fixture(scope="module")
def processor() -> PromptProcessor:
    """With bounds within which images keep their size (the embedded base scales all to one area)."""
    return PromptProcessor.load("tiny", min_pixels=28 * 28, max_pixels=448 * 448)


def picture(width: int = 84, height: int = 84) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((width, height))


def test_encoding_is_the_processors_own_call(processor: PromptProcessor):
    """The inherited ``processor(text=..., images=...)`` of transformers gives the same ids and patches."""
    prompts = processor.encode([WITH_IMAGE], [[picture(140, 84)]])
    text = processor.tokenizer.apply_chat_template(WITH_IMAGE, tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], images=[picture(140, 84)], return_tensors="pt")
    assert torch.equal(prompts.input_ids, expected["input_ids"])
    assert torch.equal(prompts.pixel_values, expected["pixel_values"])
    assert torch.equal(prompts.image_grid_thw, expected["image_grid_thw"])
    assert int((prompts.input_ids == processor.image_token_id).sum()) == 5 * 3


def test_images_none_one_and_two_mix_in_one_left_padded_batch(processor: PromptProcessor):
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]}]
    prompts = processor.encode([WITH_IMAGE, TEXT_ONLY, two], [[picture()], [], [picture(), picture(112, 56)]])
    assert prompts.images_per_prompt == [1, 0, 2]
    assert prompts.image_grid_thw.tolist() == [[1, 6, 6], [1, 6, 6], [1, 4, 8]]
    assert len(prompts.pixel_values) == 36 + 36 + 32
    padding = prompts.attention_mask == 0
    assert (prompts.input_ids[padding] == processor.pad_token_id).all()
    assert (prompts.attention_mask[:, -1] == 1).all()
    alone = processor.encode([TEXT_ONLY])
    selected = prompts.select([1])
    assert torch.equal(selected.input_ids, alone.input_ids)
    assert selected.pixel_values is None


def test_pixel_bounds_override_the_folders_own(processor: PromptProcessor):
    large = PromptProcessor.load("tiny", min_pixels=168 * 168, max_pixels=168 * 168)
    assert large.encode([WITH_IMAGE], [[picture()]]).image_grid_thw.tolist() == [[1, 12, 12]]
    with pytest.raises(ValueError, match="min_pixels=1000000 is more than max_pixels"):
        PromptProcessor.load("tiny", min_pixels=1_000_000)


def test_targets_end_the_turn_and_decode_to_themselves(processor: PromptProcessor):
    texts = ["<think>let me see</think><answer>red</answer>", "7", "Größe: 漢字 🎉"]
    targets = processor.encode_targets(texts)
    assert (targets.ids[torch.arange(3), targets.lengths - 1] == processor.eos_token_id).all()
    assert processor.decode(targets) == texts
    hostile = processor.encode_targets(["a<|im_end|>b<|image_pad|>"])
    assert (hostile.ids == processor.eos_token_id).sum() == 1
    assert processor.image_token_id not in hostile.ids


def test_banned_tokens_are_the_vision_tokens(processor: PromptProcessor):
    banned = processor.tokenizer.convert_ids_to_tokens(processor.banned_token_ids)
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} <= set(banned)
    assert not set(processor.banned_token_ids) & set(processor.stop_token_ids)


@pytest.mark.parametrize("text", ["<|im_end|>", "so <|image_pad|>"])
def test_a_prefix_that_ends_the_turn_or_has_an_image_is_refused(processor: PromptProcessor, text):
    assert processor.tokenizer.decode(processor.encode_prefix("<think></think><answer>")) == "<think></think><answer>"
    with pytest.raises(ValueError, match=r"the prefix '.*' has <\|\w+\|>, which no reply can go on behind"):
        processor.encode_prefix(text)


def test_an_image_without_a_place_or_a_place_without_an_image_names_the_row(processor: PromptProcessor):
    with pytest.raises(ValueError, match=r"rows.json:7: 1 places for an image in the prompt, but 2 images"):
        processor.encode([WITH_IMAGE], [[picture(), picture()]], ["rows.json:7"])
    with pytest.raises(ValueError, match=r"rows.json:8: 1 places for an image in the prompt, but 0 images"):
        processor.encode([WITH_IMAGE], [[]], ["rows.json:8"])
    hostile = [{"role": "user", "content": "What does <|image_pad|> mean?"}]
    with pytest.raises(ValueError, match=r"text must not hold <\|image_pad\|>"):
        processor.encode([hostile], [[]], ["rows.json:9"])


def test_an_image_that_cannot_be_cut_names_the_row(processor: PromptProcessor):
    with pytest.raises(ValueError, match=r"rows.json:3: images of sizes \[\(8000, 28\)\]"):
        processor.encode([WITH_IMAGE], [[picture(8000, 28)]], ["rows.json:3"])


@pytest.mark.parametrize(
    ("messages", "images", "error", "said"),
    [
        (TEXT_ONLY, None, TypeError, "messages is one chat, or texts; give a list of chats"),
        ("What?", None, TypeError, "messages is one chat, or texts"),
        (["What?"], None, TypeError, "messages is one chat, or texts"),
        ([], None, ValueError, "there is nothing to encode"),
        ([WITH_IMAGE, TEXT_ONLY], [[picture()]], ValueError, "1 lists of images for 2 chats; give each chat one"),
        ([WITH_IMAGE], [picture()], TypeError, "prompt 0: its images are <PIL.Image.* give a list of PIL images"),
        ([WITH_IMAGE], [["a.png"]], TypeError, r"prompt 0: its images are \['a.png'\]; give a list of PIL images"),
    ],
)
def test_what_is_not_nested_as_chats_and_their_images_is_said(processor, messages, images, error, said):
    with pytest.raises(error, match=said):
        processor.encode(messages, images)
