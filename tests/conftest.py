"""What every test has: one thread, no network, a fixed seed, shape checks in ``functional``, and a small model."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING

# Before torch is imported: two threads collapse on a busy machine, and nothing here may reach for the hub.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from cpt_lightning.models.processor import PromptProcessor
    from cpt_lightning.models.qwen_vl import QwenVL
    from cpt_lightning.types import Prompts

# Before the package is imported. Tests only: the package itself runs without beartype. An int may stand for a float.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook("cpt_lightning.functional", CHECKER)

# Its 200 ms for an example are over whenever another process has the core; pytest's own limit stays.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state and runs on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What was imported stays, and is looked through for garbage no more: half the time of texts of a megabyte."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before fixtures of a module too, which make runs
def pytest_runtest_setup() -> None:
    """A process numbers TensorBoard's files, and what reads them takes a tenth for one before the second."""
    if writer := sys.modules.get("tensorboard.summary.writer.event_file_writer"):
        writer._global_uid = writer.AtomicCounter(0)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    """`datasets` writes below ``tmp_path``, silently."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def processor() -> PromptProcessor:
    """The embedded base's tokenizer and image processor."""
    from cpt_lightning.models.processor import PromptProcessor

    return PromptProcessor.load("tiny")


@pytest.fixture
def small_model(processor: PromptProcessor) -> QwenVL:
    """A fresh Qwen2.5-VL of 75 k random float32 parameters, with every part of the architecture, in eval mode.

    Two layers of each kind, grouped queries, M-RoPE in three sections, windowed and full vision attention. Its weights
    are larger than a fresh model's, so that what a token attends to shows in the logits.
    """
    from cpt_lightning.models.qwen_vl import QwenVL
    from cpt_lightning.models.tiny.config import tiny_config

    config = tiny_config(processor.tokenizer)
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    for part, sizes in (
        (config.text_config, {**text, "intermediate_size": 64, "layer_types": ["full_attention"] * 2}),
        (config.vision_config, {**vision, "window_size": 56, "fullatt_block_indexes": [1]}),
    ):
        for name, size in sizes.items():
            setattr(part, name, size)
        part.initializer_range = 0.15
    rope = config.text_config.rope_parameters  # the dictionary is that of every tiny configuration: copied, not changed
    config.text_config.rope_parameters = {**rope, "mrope_section": [2, 1, 1]}
    torch.manual_seed(0)
    return QwenVL._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def mixed_prompts(processor: PromptProcessor) -> Prompts:
    """Four prompts of different lengths: one image, no image, two images of unequal size, one image again."""
    random = np.random.default_rng(0)

    def picture(width: int, height: int) -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))

    images = [[picture(84, 84)], [], [picture(140, 84), picture(56, 84)], [picture(112, 112)]]
    questions = [
        "What colour is the circle?",
        "What is 3 + 4?",
        "Are both alike?",
        "How many shapes are there?",
    ]
    messages = [
        [{"role": "user", "content": [{"type": "image"}] * len(row) + [{"type": "text", "text": question}]}]
        for row, question in zip(images, questions, strict=True)
    ]
    return processor.encode(messages, images)


@pytest.fixture
def small_folder(small_model: QwenVL, processor: PromptProcessor, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model with its processor, saved as users' backbones are."""
    folder = tmp_path_factory.mktemp("backbone")
    small_model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def interruptible():
    """A process that a shell put into the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
