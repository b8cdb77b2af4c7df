"""The embedded base's tokenizer: a byte-level BPE like Qwen's, of 800 tokens, learned from the toy world's text."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, PreTrainedTokenizerBase, Qwen2Tokenizer

from cpt_lightning.tasks.toy import FAMILIES, toy_rows
from cpt_lightning.tasks.toy_drawings import SINGLE_COLOURS, SINGLE_SHAPES, WORDS
from cpt_lightning.tasks.toy_scenes import COLOURS, SHAPES
from cpt_lightning.tasks.toy_text import CAPITALS

VOCABULARY_SIZE = 800
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
STYLE_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""Ordinary added tokens: unlike the special ones they are part of an answer's text and stay when it is decoded."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
"""Qwen2.5-VL's, but without a default system turn: it would double the length of a toy prompt."""

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2 cuts text before merging bytes: digits stand alone."""

GENERIC_TEXT = (
    "what is in the image? what color is the shape? what shape is in the image? what shape does the image contain?",
    "is there a shape in the image? is no shape present? "
    "does the image contain a shape? does the image not contain it?",
    "what is the color of the object in this picture? is this a yes or no question? how many are shown on the left?",
    "which of the following is true? answer with the option's letter from the given choices directly.",
    "Please answer the question based on the picture. Put your final answer in the answer tags. A. B. C. D.",
    "user assistant system user assistant system yes no yes no",
)
"""Common question words outside the toy world, so that other data sets' questions do not fall into single bytes."""


def train_tokenizer() -> PreTrainedTokenizerBase:
    """Learns the merges and wraps them in the tokenizer class that real Qwen2.5-VL folders name."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())  # all 256 bytes: any text can be encoded and decoded
    bpe.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = Qwen2Tokenizer(
        **_vocabulary(bpe), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None, bos_token=None
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in STYLE_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 4096
    return tokenizer


def _vocabulary(bpe: Tokenizer) -> dict:
    model = json.loads(bpe.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _corpus() -> Iterator[str]:
    """The world's questions and answers as they stand in prompts and targets, and some generic wordings."""
    for family in FAMILIES:
        for row in toy_rows(family, 0, "pretrain", 200):
            yield from (row.question, str(row.answer), row.fields["thought"], row.fields.get("caption", ""))
    kinds = (*COLOURS, *SINGLE_COLOURS, *SHAPES, *SINGLE_SHAPES, "yes", "no", "left", "right", "above", "below")
    for name in (*kinds, *WORDS, *CAPITALS.values()):
        yield from [name] * 20  # as answers
    for name in (*kinds, *CAPITALS):
        yield from [f" {name}"] * 20  # within questions
    for text in GENERIC_TEXT:
        yield from [text] * 30
    for row in toy_rows("facts", 0, "pretrain", 12):
        yield row.fields["teacher"]  # foreign to the base, but words to its tokenizer
