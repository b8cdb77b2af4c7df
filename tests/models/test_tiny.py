"""The embedded base: a real Qwen2.5-VL folder, what its card says of it, and a build that can be repeated."""

from __future__ import annotations

import json
import re
import sys
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from cpt_lightning.models.processor import TINY, PromptProcessor
from cpt_lightning.models.qwen_vl import encode_images
from cpt_lightning.models.tiny.build import build, score_table
from cpt_lightning.models.tiny.lessons import Exchange, Lesson, make_lessons
from cpt_lightning.models.tiny.packing import ANSWER_WEIGHT, Packer, patches
from cpt_lightning.models.tiny.pretraining import (
    FIRST_PHASE,
    SHIFTED,
    Phase,
    encode_toy_pictures,
    lesson_logits,
    make_optimizers,
)
from cpt_lightning.models.tiny.tokenizer import SPECIAL_TOKENS, STYLE_TOKENS, train_tokenizer
from cpt_lightning.rollouts.sampling import Sampling, sample_groups
from cpt_lightning.tasks import Prompt
from cpt_lightning.tasks.toy import FAMILIES, ToyWorld

SCORES = json.loads((TINY / "scores.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tiny():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


def test_plain_transformers_loads_the_folder_and_misses_nothing():
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, output_loading_info=True)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 4_000_000
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(TINY).convert_tokens_to_ids(
        ["<|im_end|>", "<|endoftext|>"]
    )


def test_the_folder_is_small_enough_for_the_repository():
    assert (TINY / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 8_500_000


def test_a_toy_picture_is_nine_visual_tokens_and_so_is_every_square_picture():
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(TINY)
    picture = ToyWorld("bars").split("test")[0].images[0]
    for size in (84, 64, 200):
        features = image_processor(images=[picture.resize((size, size))], return_tensors="pt")
        assert features["image_grid_thw"].tolist() == [[1, 6, 6]]


def test_special_tokens_vanish_when_decoded_and_the_tags_of_an_answer_stay(tokenizer):
    text = "<think>let me look</think><answer>red</answer><|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")
    assert len(ids) == 9
    for token in (*SPECIAL_TOKENS, *STYLE_TOKENS):
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_as_it_was(tokenizer, text):
    """Byte-level: nothing is unknown. Like Qwen's, the tokenizer composes characters first (NFC)."""
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_questions_of_a_real_data_set_need_about_a_token_for_a_word(tokenizer):
    easy_vqa = pytest.importorskip("easy_vqa")
    questions = sorted(set(easy_vqa.get_test_questions()[0]))
    words = sum(len(re.findall(r"\w+|[^\w\s]", question)) for question in questions)
    assert sum(len(tokenizer.encode(question)) for question in questions) < 1.3 * words


def test_a_prompt_is_qwens_without_a_default_system_turn(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "which?"}]
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"<|im_start|>user\n{picture}which?<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "system", "content": "Be brief."}, *messages, {"role": "assistant", "content": "This."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{picture}which?<|im_end|>\n"
        "<|im_start|>assistant\nThis.<|im_end|>\n"
    )


def test_toy_prompts_are_short():
    processor = PromptProcessor.load("tiny")
    rows = [ToyWorld(family).split("test")[0] for family in FAMILIES]
    chats = [Prompt().messages(row.question, len(row.images)) for row in rows]
    prompts = processor.encode(chats, [row.images for row in rows])
    assert prompts.lengths.max() <= 40


@pytest.mark.parametrize("family", ["existence", "bars", "word2", "polygon2", "arithmetic"])
def test_the_shipped_weights_score_what_their_card_says(family, tiny):
    """By this library's own sampler; the card's numbers come from transformers' ``generate``. Both are greedy."""
    processor = PromptProcessor.load("tiny")
    rows = list(ToyWorld(family, num_test=SCORES["num_rows"]).split("test"))
    right = 0
    for start in range(0, len(rows), 100):
        batch = rows[start : start + 100]
        chats = [Prompt().messages(row.question, len(row.images)) for row in batch]
        prompts = processor.encode(chats, [row.images for row in batch])
        completions = sample_groups(tiny, processor, prompts, 1, Sampling(max_new_tokens=32, temperature=0))
        texts = processor.decode(completions)
        right += sum(f"<answer>{row.answer}</answer>" in text for row, text in zip(batch, texts, strict=True))
    assert right / len(rows) == pytest.approx(SCORES["accuracy"]["test"][family], abs=0.02)


def test_the_base_is_partly_competent():
    """The stream's tasks leave room and give groups that differ; the probes are known well enough to be lost."""
    accuracy, mixed = SCORES["accuracy"]["test"], SCORES["mixed_groups"]
    assert set(accuracy) == set(mixed) == set(FAMILIES)
    for task in ("word2", "bars2", "polygon2", "digit2", "single"):
        assert 0.15 < accuracy[task] < 0.85, task
        assert mixed[task] > 0.3, task
    for probe in ("colour", "existence", "count", "facts", "bars", "word"):
        assert accuracy[probe] > 0.9, probe
    assert 0.6 < accuracy["arithmetic"] < 0.95, "a probe that can rise as well as fall"


def test_the_card_shows_the_recorded_scores():
    assert score_table(SCORES) in (TINY / "README.md").read_text()


def test_building_twice_with_one_seed_gives_the_same_folder_and_another_seed_other_weights(tmp_path, monkeypatch):
    """On few lessons a step: with all of them it takes half a minute on an old CPU."""
    for phase in ("FIRST_PHASE", "SHIFTED"):
        recipe = getattr(sys.modules[build.__module__], phase)
        monkeypatch.setattr(sys.modules[build.__module__], phase, dict.fromkeys(recipe, 1))
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        build(tmp_path / name, steps=1, shifted_steps=1, seed=seed, num_scored=0)
    files = [path.name for path in (tmp_path / "first").iterdir()]
    assert set(files) | {"README.md", "scores.json"} == {path.name for path in TINY.iterdir()}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    first, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "other"))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_vocabulary_learned_from_the_toy_world_is_the_shipped_one(tokenizer):
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_lessons_depend_on_seed_and_step_and_follow_the_recipe():
    lessons = make_lessons(0, 3, {"scenes": 2, "charts": 1, "facts": 2})
    assert [lesson.exchanges[0].is_caption for lesson in lessons] == [True, True, True, False, False]
    assert all(len(lesson.exchanges) in (3, 4) for lesson in lessons[:2])  # 3 where a scene has an answer to two only
    assert [len(lesson.exchanges) for lesson in lessons[2:]] == [3, 1, 1]
    assert [lesson.image is None for lesson in lessons] == [False, False, False, True, True]
    again, later = make_lessons(0, 3, {"scenes": 2}), make_lessons(0, 4, {"scenes": 2})
    assert again[1].exchanges == lessons[1].exchanges != later[1].exchanges
    assert set(FIRST_PHASE) & set(SHIFTED) == set()


def test_fast_pictures_are_what_the_image_processor_and_the_vision_tower_make_of_them(tiny):
    images = [ToyWorld(family).split("test")[0].images[0] for family in ("colour", "bars", "word")]
    features = Qwen2VLImageProcessorPil.from_pretrained(TINY)(images=images, return_tensors="pt")
    torch.testing.assert_close(patches(images), features["pixel_values"])
    processor = PromptProcessor.load("tiny")
    prompts = processor.encode([Prompt().messages("which?", 1)] * 3, [[image] for image in images])
    with torch.no_grad():
        torch.testing.assert_close(encode_toy_pictures(tiny, prompts.pixel_values), encode_images(tiny, prompts))


def test_a_packed_exchange_is_predicted_as_if_it_stood_alone(tiny, tokenizer):
    """Every learned token's logits in the packed rows equal those of a plain forward over prompt and reply."""
    packer = Packer(tokenizer, row_length=10_000)  # all lessons in one row, the longest first
    lessons = make_lessons(0, 0, {"scenes": 2, "word": 1, "arithmetic": 2})
    packed = packer.pack(lessons)
    assert len(packed.input_ids) == 1
    with torch.no_grad():
        together = lesson_logits(tiny, packed)
        start = 0
        for lesson in sorted(lessons, key=lambda lesson: -len(packer.pack([lesson]).input_ids[0])):
            for exchange in lesson.exchanges:
                alone = plain_logits(tiny, lesson, exchange)
                torch.testing.assert_close(together[start : start + len(alone)], alone, atol=2e-4, rtol=0)
                start += len(alone)
    assert start == len(together) == len(packed.weights)


def plain_logits(model, lesson: Lesson, exchange: Exchange) -> torch.Tensor:
    """``[reply tokens, V]`` of transformers' own forward over one prompt and its reply."""
    processor = PromptProcessor.load("tiny")
    images = [] if lesson.image is None else [lesson.image]
    prompts = processor.encode([Prompt().messages(exchange.question, len(images))], [images])
    reply = processor.encode_targets([f"<think>{exchange.thought}</think><answer>{exchange.answer}</answer>"]).ids
    ids = torch.cat([prompts.input_ids, reply], dim=1)
    pictures = {"pixel_values": prompts.pixel_values, "image_grid_thw": prompts.image_grid_thw} if images else {}
    types = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, mm_token_type_ids=types, attention_mask=torch.ones_like(ids), **pictures).logits
    return logits[0, prompts.input_ids.shape[1] - 1 : -1]


def test_answers_weigh_four_times_and_captions_and_questions_do_not(tokenizer):
    answer = Exchange("which?", "let me look", "red")
    caption = Exchange("which?", "let me look", "red", is_caption=True)
    packer = Packer(tokenizer)
    # <think> let me look </think> <answer> red </answer> <|im_end|>
    assert packer.pack([Lesson(None, [answer])]).weights.tolist() == [1] * 6 + [ANSWER_WEIGHT] + [1] * 2
    assert packer.pack([Lesson(None, [caption])]).weights.tolist() == [1] * 9


def test_the_learning_rate_warms_up_and_falls_to_zero():
    phase = Phase(steps=100, lr=1.0, recipe={}, warmup=10)
    assert phase.lr_factor(0) == pytest.approx(0.1)
    assert phase.lr_factor(50) == pytest.approx(0.5)
    assert phase.lr_factor(99) == pytest.approx(0.01)


def test_every_parameter_is_trained_by_one_optimizer_and_muon_takes_only_matrices(tiny):
    muon, adamw = make_optimizers(tiny, 1e-3)
    groups = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    assert sum(map(len, groups)) == len(list(tiny.parameters()))
    assert all(parameter.ndim == 2 for parameter in groups[0])
    embeddings = tiny.get_input_embeddings().weight
    assert any(parameter is embeddings for parameter in groups[1])
